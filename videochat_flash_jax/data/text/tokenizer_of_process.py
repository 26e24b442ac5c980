"""A tokenizer that every process makes for itself."""

from collections.abc import Callable

from videochat_flash_jax.data.text.tokenizer import Tokenizer


class TokenizerOfProcess:
  """Has a tokenizer, which is made at its first use and never sent to another process."""

  def __init__(self, make_tokenizer: Callable[[], Tokenizer]):
    """Stores the function; the tokenizer is made at its first use."""
    self._make_tokenizer, self._tokenizer = make_tokenizer, None

  def __getstate__(self) -> dict:
    return self.__dict__ | {"_tokenizer": None}

  @property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer of this process."""
    if self._tokenizer is None:
      self._tokenizer = self._make_tokenizer()
    return self._tokenizer
