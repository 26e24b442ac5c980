"""The small world that tests, demos and the tiny model live in: coloured things that pass.

Takes a seed. Gives videos and questions whose answers are known.

| file       | what it does                                                              |
|------------|---------------------------------------------------------------------------|
| `world`    | draws scenes, asks questions, writes video files and annotations          |
| `shapes`   | the outlines of things                                                    |
| `render`   | pictures of a scene at any moment                                         |
| `training` | conversations and clips of the model's size, without files                |
| `examples` | the same as batches, like those of a mixture                              |
"""
