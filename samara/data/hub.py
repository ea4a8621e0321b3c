"""Datasets of the Hugging Face hub, or a local folder in the same layout, read by ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator

from samara.data.config import HubDataset
from samara.data.documents import Document
from samara.data.local_files import document_of_record
from samara.errors import DataError


def read_dataset(source: HubDataset) -> Iterator[Document]:
    """The dataset's rows as documents; ids are the rows' own, else their number.

    Raises:
        DataError: If ``datasets`` is not installed, the dataset cannot be reached or read, or a
            row lacks the text field.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"source.name: '{source.name}' needs the package datasets; pip install 'samara[data]'"
        ) from None
    try:
        rows = iter(
            datasets.load_dataset(
                source.name,
                source.config,
                split=source.split,
                revision=source.revision,
                streaming=source.streaming,
            )
        )
    except Exception as error:  # the library lets every kind of network error through
        raise _unreachable(source, error) from error
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _unreachable(source, error) from error
        number += 1
        origin = f"{source.name}/{source.split}:{number}"
        yield document_of_record(
            row, text_field=source.text_field, origin=origin, default_id=origin
        )


def _unreachable(source: HubDataset, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"source.name: dataset '{source.name}' (config {source.config}, split {source.split}) "
        f"cannot be read: {reason:.300}; check the name, the network and HF_HUB_OFFLINE, or give "
        "a local folder"
    )
