"""Reads and writes the released format: a directory with `config.json`, weights and a tokenizer.

| file                | what it does                                                             |
|---------------------|--------------------------------------------------------------------------|
| `directory`         | finds the directory of a model by its name, and downloads it if needed   |
| `checkpoint`        | holds an open checkpoint: its config, and its tensors by their hub names |
| `hf_config`         | translates `config.json` to our config, and back                         |
| `hf_options`        | translates the optional parts of `config.json`: dropout, YaRN, tiles     |
| `typed_fields`      | checks the types of JSON fields                                          |
| `hf_mapping`        | holds the table of names: each hub tensor and the array that it fills    |
| `weights`           | converts hub tensors to arrays, and back, one tensor at a time           |
| `int8_tensors`      | makes the matrices of the decoder int8 while they are read               |
| `other_files`       | copies tokenizer, chat templates, licence and so on                      |
| `safetensors_files` | reads and writes safetensors files in blocks                             |
| `torch_files`       | reads tensors from PyTorch files                                         |
| `parts`             | joins a language model, an encoder and a projector                       |
"""
