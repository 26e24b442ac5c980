"""The command line `vcflash`. Each verb is one module.

| file          | what it does |
|---------------|--------------|
| `main`        | finds the verb and runs it; exit codes |
| `chat`        | answers questions about videos and images |
| `prompt`      | the lines that a person types |
| `log`         | what the package logs, on stderr |
| `demo`        | a video, and three questions about it |
| `evaluate`    | counts right answers |
| `synth`       | writes synthetic videos with questions |
| `data`        | checks, converts, indexes and encodes annotations |
| `train`       | runs a config |
| `fit`         | what fits into the memory of a chip |
| `compile`     | compiles a config for TPUs that are not here |
| `convert`     | writes a checkpoint in the layout of the hub |
| `bench`       | measures speed |
| `config_file` | reads config files, and --config.FIELD=VALUE |
"""
