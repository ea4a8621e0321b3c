"""Datasets of the Hugging Face hub, or a local folder in the same layout, read by ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samara.data.config import HubDataset
from samara.data.documents import Document
from samara.data.local_files import document_of_record
from samara.errors import DataError

SAVED = ("dataset_dict.json", "state.json")
"""What ``save_to_disk`` leaves in a folder: of several splits, of one."""


def read_dataset(source: HubDataset) -> Iterator[Document]:
    """The dataset's rows as documents; ids are the rows' own, else their number.

    Raises:
        DataError: If ``datasets`` is not installed, the dataset cannot be reached or read, or a
            row lacks the text field.
    """
    for number, row in enumerate(iterate_rows(open_dataset(source), source), start=1):
        origin = f"{source.name}/{source.split}:{number}"
        yield document_of_record(
            row, text_field=source.text_field, origin=origin, default_id=origin
        )


def open_dataset(source: HubDataset, *, key: str = "source.name") -> Any:
    """A dataset of the hub, a local folder in its layout, or what ``save_to_disk`` wrote.

    Args:
        source: Which.
        key: Of the recipe that names it, for errors.

    Raises:
        DataError: If ``datasets`` is not installed, or the dataset cannot be reached or read.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{key}: '{source.name}' needs the package datasets; pip install 'samara[data]'"
        ) from None
    folder = Path(source.name).expanduser()
    try:
        if any((folder / name).is_file() for name in SAVED):
            saved = datasets.load_from_disk(str(folder))
            return saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(
            source.name,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except Exception as error:  # the library lets every kind of network error through
        raise _unreachable(source, error, key) from error


def iterate_rows(
    dataset: Any, source: HubDataset, *, key: str = "source.name"
) -> Iterator[dict[str, Any]]:
    """The rows of :func:`open_dataset`.

    Raises:
        DataError: If one cannot be read.
    """
    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _unreachable(source, error, key) from error
        yield row


def _unreachable(source: HubDataset, error: Exception, key: str) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{key}: dataset '{source.name}' (config {source.config}, split {source.split}) "
        f"cannot be read: {reason:.300}; check the name, the network and HF_HUB_OFFLINE, or give "
        "a local folder"
    )
