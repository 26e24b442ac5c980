"""From a video and a question to an answer.

| file               | what it does |
|--------------------|--------------|
| `chat`             | `VideoChat`: watches videos, looks at images; the entry of this folder |
| `conversation`     | questions and answers about what was seen |
| `messages`         | messages as other APIs have them, as a conversation of ours |
| `seen`             | the videos and images that a conversation has seen |
| `turns`            | threads that share a conversation wait for each other |
| `watching`         | decodes, encodes and reads frames at the same time |
| `engine`           | encodes clips, reads questions into KV caches, and decodes |
| `reading`          | `Prompt` and `Reading`: what the engine is given, and what it has read |
| `prefix`           | what all questions stand behind: a video or images, read in chunks |
| `token_rows`       | vectors of tokens on the host, which enter a drop |
| `programs`         | the jitted programs of the engine |
| `program_shapes`   | the same with shapes for arguments, for `vcflash compile` |
| `cpu_layers`       | how the engine keeps a decoder on a CPU |
| `sampler`          | chooses the next token |
| `interrupts`       | Ctrl-C waits until what is being changed is whole |
| `limits`           | whether a model can be split over a mesh; what needed too much memory |
| `fitting`          | what fits into the memory of a device, from sizes alone |
| `feature_encoding` | fills a feature store with the output of the encoder |
"""
