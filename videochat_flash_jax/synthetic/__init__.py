"""The synthetic world: small videos of moving coloured things, for tests, demos and the tiny model.

Input: a seed. Output: videos, and questions about them whose answers are known.

| file       | what it does                                                              |
|------------|---------------------------------------------------------------------------|
| `world`    | draws scenes, asks questions, writes video files and annotations          |
| `shapes`   | computes the outlines of things                                           |
| `render`   | renders the frames of a scene at any time                                 |
| `training` | makes conversations and clips of the model's picture size, without files  |
| `examples` | makes batches of these conversations, like the batches of a mixture       |
"""
