"""From a video and a question to an answer; never imports `train`."""
