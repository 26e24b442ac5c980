"""From a video and a question to an answer.

| file               | what it does |
|--------------------|--------------|
| `chat`             | `VideoChat`: watches videos, looks at images; the entry of this folder |
| `conversation`     | questions and answers about what was seen |
| `engine`           | encodes clips, reads prompts into KV caches, and decodes |
| `programs`         | the jitted programs of the engine, and their buckets |
| `cpu_layers`       | how the engine keeps a decoder on a CPU |
| `sampler`          | chooses the next token |
| `limits`           | what is checked before anything is computed |
| `feature_encoding` | fills a feature store with the output of the encoder |
"""
