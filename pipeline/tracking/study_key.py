"""The name of a study in Optuna and MLflow, `<study>-v<version>-<data set>`: formatted and parsed here only.

Imports nothing heavy: a mistyped name is refused before torch and MLflow are imported.
"""

import re
from typing import NamedTuple


class StudyKey(NamedTuple):
    """`attention-v1-digits`; as a folder's data set has digits of its digest in its name, `attention-v1-pets-3fa9c1`."""

    study: str  # a module of studies/, whose name can't hold `-v1-`
    version: int
    data: str  # `Dataset.name`

    def __str__(self) -> str:
        return f"{self.study}-v{self.version}-{self.data}"

    @classmethod
    def parse(cls, text: str) -> "StudyKey | None":
        """None where the text is no key, as the name of a study of another program."""
        match = re.fullmatch(r"(.+?)-v([1-9]\d*)-(.+)", text)
        return cls(match[1], int(match[2]), match[3]) if match else None

    def is_meant_by(self, name: str) -> bool:
        """Whether the name means it: the study's name, or the key without a digest's digits."""
        return name in (self.study, str(self.bare))

    @property
    def bare(self) -> "StudyKey":
        """The key without a folder's digits, which several data sets may share."""
        return self._replace(data=re.sub(r"-[0-9a-f]{6}$", "", self.data))
