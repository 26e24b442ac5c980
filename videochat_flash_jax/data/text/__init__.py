"""Words become token ids.

Takes the turns of a conversation. Gives token ids and labels, with one slot for each video or
image, and then opens each slot into positions for its visual tokens.

| file                   | what it does                                                     |
|------------------------|------------------------------------------------------------------|
| `conversation`         | templates, the time message, and which tokens are learnt         |
| `tokenizer`            | text to token ids and back                                       |
| `tokenizer_of_process` | gives each worker process a tokenizer of its own                 |
| `visual_slots`         | opens the slot of a video or image into positions for its tokens |
"""
