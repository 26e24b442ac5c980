"""Parses YAML: as PyYAML does, but a key that stands twice is an error, and 1e3 is a number."""

import re

import yaml

# PyYAML follows YAML 1.1, where an exponent needs a point before it and a sign; else it is a text.
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?)$")
_MERGE_TAG = "tag:yaml.org,2002:merge"


def parse_yaml(text: bytes) -> object:
  """Returns what the one document in a YAML text means, made of plain types.

  Raises:
    ValueError: the text is not valid YAML, or a key stands twice in a mapping; the message is one
      line, with the number of a line if it is known.
  """
  try:
    return yaml.load(text, _Loader)
  except yaml.MarkedYAMLError as error:
    where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    raise ValueError(f"{where}{error.problem}") from error
  except Exception as error:  # a tag before a value that it does not fit raises errors of any type
    raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error


class _Loader(yaml.SafeLoader):
  """PyYAML's safe loader with the two corrections."""

  def compose_mapping_node(self, anchor):
    """Refuses a key that stands twice; PyYAML would drop the first one.

    A key may also be among those that are merged in (`<<`), as YAML says.
    """
    node = super().compose_mapping_node(anchor)
    lines = {}
    for key, _ in node.value:
      if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
        name = key.tag, key.value
        if name in lines:
          problem = f"key {key.value!r:.100} stands twice, first in line {lines[name]}"
          raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        lines[name] = key.start_mark.line + 1
    return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("+-.0123456789"))
