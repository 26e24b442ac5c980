"""Turns the text of a conversation into token ids.

Takes the turns of a conversation. Gives token ids and labels, with one slot for each video or
image. Then opens each slot into as many positions as it has visual tokens.

| file                   | what it does                                                         |
|------------------------|----------------------------------------------------------------------|
| `conversation`         | templates, the time message, and which tokens count in the loss      |
| `tokenizer`            | converts text to token ids and back                                  |
| `tokenizer_of_process` | gives each worker process a tokenizer of its own                     |
| `visual_slots`         | opens the slot of a video or image into positions for visual tokens  |
"""
