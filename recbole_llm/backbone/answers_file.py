"""The answers of an endpoint on disk, so that no prompt is paid for twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from recbole_llm.errors import UserError

__all__ = ["AnswersFile"]

_RECORD_START = b'{"key": "'


class AnswersFile:
    """JSON lines ``{"key": sha256 of the request, "model": its name, "text": the answer}``, appended to within a context.

    Args:
        path: of the file; None: nothing is read or written.
    """

    def __init__(self, path: str | os.PathLike | None) -> None:
        self.path = None if path is None else Path(path)
        self._complete_bytes = 0  # up to the end of the last complete record
        self._ends_line = True
        self._file: BinaryIO | None = None

    def read(self) -> dict[str, str]:
        """Return key -> text; of several records with the same key, the last.

        Raises:
            UserError: the file cannot be read, or holds something else than answers.
        """
        texts: dict[str, str] = {}
        if self.path is None or not self.path.exists():
            return texts
        if not self.path.is_file():
            raise UserError(f"answers_file {self.path} is no regular file; name one.")
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    ends_line = line.endswith(b"\n")
                    record = _parse_record(line)
                    if record is not None:
                        texts[record["key"]] = record["text"]
                    elif line.strip():
                        # A killed run may leave the start of a record: it is ignored here, and cut off before writing.
                        if not ends_line and (line.startswith(_RECORD_START) or _RECORD_START.startswith(line)):
                            break
                        raise UserError(
                            f"{self.path}, line {number}: not an answer; delete the line, or name another answers_file"
                        )
                    self._complete_bytes += len(line)
                    self._ends_line = ends_line
        except OSError as error:
            raise UserError(f"answers_file {self.path} cannot be read: {error.strerror}") from None
        return texts

    def __enter__(self) -> AnswersFile:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "ab")
                if self._file.tell() > self._complete_bytes:
                    self._file.truncate(self._complete_bytes)
                if not self._ends_line:
                    self._file.write(b"\n")
            except OSError as error:
                raise self._cannot_write(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, key: str, model: str, text: str) -> None:
        """Append an answer and flush it."""
        if self._file is None:
            return
        # ASCII only: half a surrogate pair in an answer has no UTF-8.
        line = json.dumps({"key": key, "model": model, "text": text}) + "\n"
        try:
            self._file.write(line.encode("ascii"))
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"answers_file {self.path} cannot be written: {error.strerror}; name another file")


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and isinstance(record.get("key"), str) and isinstance(record.get("text"), str):
        return record
    return None
