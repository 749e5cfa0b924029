"""What torch.distributed.checkpoint wrote, read without running what somebody else may have put there.

PyTorch unpickles its metadata, and every entry that is no tensor, and a pickle calls whatever it names. Here metadata
may name its own classes only, and entries are tensors only, which PyTorch reads with `weights_only=True`.
"""

import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from expertmesh.checkpoint.verify import CheckpointError

_KNOWN = {
    (found.__module__, found.__name__): found
    for found in (
        *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING),
        *(metadata.TensorStorageMetadata, metadata.ChunkStorageMetadata, metadata.TensorProperties),
        *(metadata.BytesStorageMetadata, filesystem._StorageInfo, torch.serialization._get_layout, torch.Size),
    )
} | {(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        found = found if isinstance(found, torch.dtype) else _KNOWN.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint")
        return found


class TensorReader(dcp.FileSystemReader):
    """Reads the tensors in a folder. Raises CheckpointError, before it reads any, for what is no tensor in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """As in PyTorch."""
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
            entries, places = found.state_dict_metadata.items(), found.storage_data.items()
            odd = [name for name, entry in entries if not isinstance(entry, metadata.TensorStorageMetadata)]
            odd += [
                index.fqn
                for index, place in places
                if PurePosixPath(place.relative_path).name != place.relative_path or place.transform_descriptors
            ]
            if odd:
                raise pickle.UnpicklingError(f"{odd[0]} is no tensor in this folder")
        except Exception as error:  # whatever a damaged pickle makes of itself
            raise CheckpointError(
                f"{path} is refused: {error}. Nothing was loaded. Move the checkpoint away and resume from the one "
                f"before, or take one from a source you trust.",
                [f"{path.name}: {error}"],
            ) from None
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found
