"""The released layout: a directory with `config.json`, weights and a tokenizer.

| file                | what it does                                                             |
|---------------------|--------------------------------------------------------------------------|
| `directory`         | finds the directory of a model by its name, and downloads it if need be  |
| `checkpoint`        | a checkpoint that is open: its config, and its tensors by their hub names |
| `hf_config`         | translates `config.json` to our config, and back                         |
| `hf_options`        | the parts of `config.json` that can be switched: dropout, YaRN, tiles    |
| `typed_fields`      | checks the types of JSON fields                                          |
| `hf_mapping`        | the table of names: a tensor on the hub, and the array here that it fills |
| `weights`           | fills arrays from tensors, and back, one tensor at a time                |
| `safetensors_files` | reads and writes safetensors in blocks                                   |
| `torch_files`       | reads tensors from files of torch                                        |
| `parts`             | joins a language model, an encoder and a projector                       |
"""
