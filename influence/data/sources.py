"""Datasets from the Hub, files, saved folders or memory, loaded and read slice by slice."""

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from influence.data.parsing import LARGEST_ROW, check_files, reason, shortly, unreadable, yaml_of
from influence.store import BadFileError

Records: TypeAlias = list[dict[str, Any]]
"""A slice of a dataset, a dictionary a row."""

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
"""The name that `datasets` has for the reader of a local file, by suffix."""


def load(
    source: Any,
    *,
    split: str | None = None,
    subset: str | None = None,
    data_kwargs: str | Mapping[str, Any] | None = None,
    streaming: bool = False,
    max_document_bytes: int = LARGEST_ROW,
) -> Any:
    """Load a dataset.

    Args:
        source: a Hub id; a local file (.csv, .json, .jsonl, .parquet, .arrow, .txt) or a pattern of them; a folder
            which `save_to_disk` wrote; a `datasets` object; or a list of dictionaries.
        split: a split, a slice or a sum of them, such as `"train[:10%]+test"`. By default the only split there is, or
            `"train"`.
        subset: the configuration of a Hub dataset.
        data_kwargs: more arguments for `datasets.load_dataset`: a mapping, or one written in JSON or YAML.
        streaming: return an `IterableDataset`, read as it is used.
        max_document_bytes: refuse a local file of text with a larger row, before a reader meets it.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no such split, no row, a row that is too large, or an argument makes no sense here.

    Example:
        >>> load([{"text": "a"}, {"text": "b"}]).column_names
        ['text']
    """
    import datasets

    kwargs = mapping_of(data_kwargs)
    taken = sorted({"path", "name", "split", "streaming"} & {*kwargs})
    if taken:
        raise ValueError(
            f"data_kwargs has {', '.join(taken)}: pass source, subset, split and streaming to load instead"
        )
    source = os.path.expanduser(source) if isinstance(source, str | Path) else source
    local = not isinstance(source, str) or _is_saved(Path(source))
    if local and (kwargs or subset is not None):
        raise ValueError("subset and data_kwargs are arguments of datasets.load_dataset; this source does not use it")
    if isinstance(source, str):
        if not local:
            return _read(source, split, subset, kwargs, streaming, max_document_bytes)
        source = _saved(source)
    elif isinstance(source, Sequence) and not isinstance(source, datasets.Dataset):
        source = _from_list(source)
    if isinstance(source, datasets.IterableDataset):
        if split is not None:
            raise ValueError(f"an IterableDataset has no splits; got split={split!r}: use .skip(n).take(m) instead")
        return source
    if isinstance(source, datasets.Dataset):
        source = {str(source.split or "train"): source}
    known = datasets.Dataset | datasets.IterableDataset
    if not isinstance(source, Mapping) or not all(isinstance(split, known) for split in source.values()):
        raise ValueError(
            "source must be a Hub id, a path, a datasets.Dataset, an IterableDataset or a list of dictionaries, one a "
            f"row; got a {type(source).__name__}"
        )
    chosen = _not_empty(_choose(source, split))
    return chosen.to_iterable_dataset() if streaming and isinstance(chosen, datasets.Dataset) else chosen


def mapping_of(kwargs: str | Mapping[str, Any] | None, name: str = "data_kwargs") -> dict[str, Any]:
    """Return keyword arguments given as a mapping, or as one written in JSON or YAML; the name is for messages.

    Example:
        >>> mapping_of('{delimiter: ",", names: [a, "b=c"]}')
        {'delimiter': ',', 'names': ['a', 'b=c']}
    """
    read = yaml_of(kwargs, name, ValueError, "JSON or YAML") if isinstance(kwargs, str) else kwargs
    if not isinstance(read or {}, Mapping) or not all(isinstance(key, str) for key in read or {}):
        raise ValueError(f'{name} must be a mapping such as {{"delimiter": ","}}; got {shortly(kwargs)}')
    return dict(read or {})


def slices(dataset: Any, size: int, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Records]]:
    """Yield slices of `size` rows of a dataset, with some columns: the first row's number, and the rows."""
    import datasets

    chosen = dataset.with_format(None)
    if columns is not None and chosen.column_names:
        chosen = chosen.select_columns(list(columns))
    if isinstance(chosen, datasets.Dataset):
        for begin in range(0, len(chosen), size):
            with _readable(dataset, begin):
                lists = chosen[begin : begin + size]
            yield begin, [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        return
    begin, rows = 0, iter(chosen)
    while piece := _next(dataset, rows, begin, size):
        yield begin, piece if columns is None else [{name: row.get(name) for name in columns} for row in piece]
        begin += len(piece)


def _next(stream: Any, rows: Iterator[Any], begin: int, size: int) -> Records:
    """Return the next rows of a stream."""
    with _readable(stream, begin):
        return list(islice(rows, size))


@contextlib.contextmanager
def _readable(dataset: Any, begin: int) -> Iterator[None]:
    """Name the file, or the first row, if rows cannot be read.

    Raises:
        BadFileError: with that name.
    """
    try:
        yield
    except (ValueError, OSError, RecursionError) as error:
        files = list(dataset.info.download_checksums or ())
        if files and dataset.info.builder_name:
            raise _unreadable(Path(files[0]), files, dataset.info.builder_name, error, {}) from error
        name = f" {dataset.info.dataset_name}" if dataset.info.dataset_name else ""
        raise BadFileError(f"the dataset{name} cannot be read from row {begin} on: {reason(error)}") from error


def column_names(dataset: Any) -> list[str]:
    """Return the names of a dataset's columns; a stream that does not know them is asked for its first row.

    Raises:
        ValueError: if it is no dataset, has no row to ask, or would be read without its transform.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise ValueError(
            f"expected a datasets.Dataset or IterableDataset, as load returns; got a {type(dataset).__name__}"
        )
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        raise ValueError("the dataset has a transform (with_transform), which is not applied here: use dataset.map")
    names = dataset.column_names
    if names:
        return list(names)
    first = _next(dataset, iter(dataset), 0, 1)
    if not first:
        raise ValueError("the dataset is empty: it has no row")
    return list(first[0])


def _saved(folder: str) -> Any:
    """Return what `save_to_disk` wrote."""
    import datasets

    try:
        return datasets.load_from_disk(folder)
    except Exception as error:  # of its JSON and its Arrow files, datasets raises whatever it meets
        gone = isinstance(error, FileNotFoundError) and error.filename
        what = f"{error.filename} is missing" if gone else reason(error)  # type: ignore[attr-defined]
        raise BadFileError(
            f"the dataset saved in {folder} cannot be read: {what}. One of its files is damaged, cut off or gone: save "
            "it again"
        ) from error


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _read(
    source: str, split: str | None, subset: str | None, kwargs: dict[str, Any], streaming: bool, most: int
) -> Any:
    """Read files or the Hub."""
    import datasets

    if streaming and split is not None and not split.isidentifier():
        raise ValueError(f"a stream has whole splits only, got split={split!r}: use load(…).skip(n).take(m)")
    files: list[str] = []
    path, escaped = Path(source), glob.escape(source) if os.path.exists(source) else source
    suffix = path.suffix.lower()
    if "://" not in source and (suffix in BUILDERS or path.is_file()):
        if suffix not in BUILDERS:
            raise ValueError(f"no reader for {source}; there is one for {', '.join(BUILDERS)}")
        found = glob.glob(escaped)
        if not found:
            raise FileNotFoundError(f"no file {source}")
        if not any(os.path.getsize(name) for name in found):
            raise ValueError(f"the dataset is empty: {source} has no byte")
        if subset is not None:
            raise ValueError(f"a file has no subsets; got subset={subset!r} for {source}")
        files = sorted(found)
        kwargs = {"data_files": escaped} | kwargs
        source = BUILDERS[suffix]
    elif path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"the folder {source} is empty")
    elif not path.is_dir() and (path.is_absolute() or source.startswith(".")):
        raise FileNotFoundError(f"no file or folder {source}")
    here = _here(path, kwargs.get("data_files"))
    check_files(here, most)
    if source == "pandas":
        raise ValueError(
            "the builder 'pandas' of datasets reads pickles, which can run code: save the table as .parquet"
        )
    try:
        read = datasets.load_dataset(source, subset, streaming=streaming, **kwargs)
    except Exception as error:  # readers of files raise whatever they meet
        if "corresponds to no data" in str(error):
            raise ValueError(f"the dataset is empty: {path} has no row") from error
        if not files and not isinstance(error, datasets.exceptions.DatasetGenerationError):
            raise
        kind, suspects = (source, files) if files else _of_one_kind(here)
        raise _unreadable(path, suspects, kind, error, kwargs) from error
    found = _choose(read, split) if isinstance(read, Mapping) else read
    if suspects := files or _of_one_kind(here)[1]:
        found.info.download_checksums = dict.fromkeys(suspects)  # of which files it is, for whoever reads its rows
    return _not_empty(found)


def _unreadable(path: Path, files: list[str], builder: str, error: Exception, kwargs: Mapping[str, Any]) -> Exception:
    """Return the error for data that cannot be read: it names the file, if there are files."""
    import datasets

    cause = error.__cause__ or error
    if not files or (isinstance(cause, OSError) and cause.errno is not None):  # a full disk, no permission
        return ValueError(f"the dataset {path} cannot be read: {reason(error)}")
    if isinstance(error, TypeError) or "BuilderConfig" in str(error):
        return ValueError(f"data_kwargs is not for {path}: {reason(error)}")
    more = {name: value for name, value in kwargs.items() if name != "data_files"}

    def again(file: str) -> Iterator[Any]:
        return chain.from_iterable(
            datasets.load_dataset(builder, data_files=glob.escape(file), streaming=True, **more).values()
        )

    return unreadable(files, builder, error, again)


def _here(path: Path, data_files: Any) -> list[str]:
    """Return the local files that a reader will get: a folder's, or those named."""
    if path.is_dir():
        return [str(file) for file in path.rglob("*") if file.is_file()]
    names = data_files.values() if isinstance(data_files, Mapping) else [data_files]
    each = [name for some in names for name in ([some] if isinstance(some, str) else some or [])]
    return [file for name in each if isinstance(name, str) and "://" not in name for file in glob.glob(name)]


def _of_one_kind(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return what `datasets` calls the reader of most files, and those which it reads."""
    kinds = [BUILDERS.get(Path(path).suffix.lower(), "") for path in paths]
    kind = max(filter(None, kinds), key=kinds.count, default="")
    return kind, sorted(path for path, own in zip(paths, kinds, strict=True) if own == kind and kind)


def _from_list(rows: Sequence[Any]) -> Any:
    """Return a dataset of dictionaries; a value that a row lacks is None."""
    import datasets

    strange = next((row for row in rows if not isinstance(row, Mapping)), None)
    if strange is not None:
        raise ValueError(f"a list of rows must hold dictionaries only; got a {type(strange).__name__}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def _choose(splits: Mapping[Any, Any], split: str | None) -> Any:
    """Return a split, or the slices and sums of splits in an expression."""
    import datasets

    named = {str(name): dataset for name, dataset in splits.items()}
    if split in named:
        return named[split]
    if split is None:
        if len(named) != 1 and "train" not in named:
            raise ValueError(f"the dataset has the splits {', '.join(named)}: pass split=")
        return named["train"] if "train" in named else next(iter(named.values()))
    if not all(isinstance(dataset, datasets.Dataset) for dataset in named.values()):
        raise ValueError(f"no split {split!r}; there are {', '.join(named)}")
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(d) for name, d in named.items()})
    except (ValueError, AssertionError) as error:
        sizes = ", ".join(f"{name} ({len(dataset)} rows)" for name, dataset in named.items())
        raise ValueError(f"no split {split!r}; there are {sizes}, their slices [a:b] and sums +") from error
    pieces = []
    for part in parts:
        whole = named[part.splitname]
        stop = len(whole) if part.to is None else part.to
        pieces.append(whole.select(range(part.from_ or 0, stop)))
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


def _not_empty(dataset: Any) -> Any:
    import datasets

    if isinstance(dataset, datasets.Dataset) and not len(dataset):
        raise ValueError("the dataset is empty: it has no row")
    return dataset
