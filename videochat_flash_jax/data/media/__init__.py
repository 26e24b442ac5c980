"""Turns a video or image file into pixels.

Takes a path or an address of a video, an image, a folder of pictures, or frames that are there or
yet to come. Gives uint8 RGB frames `[frames, height, width, 3]` with their times in seconds, or
uint8 image tiles.

| file             | what it does                                                           |
|------------------|------------------------------------------------------------------------|
| `files`          | opens local paths and addresses (`gs://`, `https://`) in the same way  |
| `frame_sampling` | chooses which frames of a video the model sees                         |
| `frame_choice`   | chooses them from a part of a video, and tells when they are shown     |
| `open_source`    | opens whatever a user wants to have watched                            |
| `frame_source`   | gives the frames of a video, of pictures, or of an iterator            |
| `ahead`          | reads ahead in a thread                                                |
| `video_reader`   | opens a video and gives chosen frames; start reading here              |
| `video_decoder`  | decodes chosen frames of one video file, and as few others as possible |
| `video_timeline` | finds when each frame is shown and where decoding can start            |
| `video_packets`  | reads the packets of a stream: their order, and how long they last     |
| `picture_folder` | lists the pictures of a folder that are the frames of a video          |
| `image_reader`   | reads one image the way an image viewer shows it                       |
| `image_tiling`   | cuts an image into square tiles and a base view                        |
| `resize`         | resizes pictures to the size that the encoder takes                    |
"""
