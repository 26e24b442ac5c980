"""A tokenizer of which every process that reads examples has its own."""

from collections.abc import Callable

from videochat_flash_jax.data.text.tokenizer import Tokenizer


class TokenizerOfProcess:
  """Has a tokenizer, made when it is first asked for, by every process for itself."""

  def __init__(self, make_tokenizer: Callable[[], Tokenizer]):
    """Makes nothing yet."""
    self._make_tokenizer, self._tokenizer = make_tokenizer, None

  def __getstate__(self) -> dict:
    return self.__dict__ | {"_tokenizer": None}

  @property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer."""
    if self._tokenizer is None:
      self._tokenizer = self._make_tokenizer()
    return self._tokenizer
