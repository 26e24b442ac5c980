"""From files on disk to rows of arrays; host side only, and free of models."""
