"""The folder of a run, looked at before anything is written: what is in the way is said at once, not hours later."""

import tempfile
from pathlib import Path

from expertmesh.checkpoint.publish import checkpoints, newest_complete
from expertmesh.train.config import Config, ConfigError

FOLDERS = ("final", "plots", "logs")
FILES = ("config.yaml", "env.json", "metrics.jsonl")


def check_folder(config: Config) -> None:
    """Raises ConfigError if `save.output_dir` cannot be written, or holds checkpoints that the run would replace."""
    folder = Path(config.save.output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        what = "a link that leads nowhere" if there.is_symlink() else "no folder"
        raise ConfigError(f"save.output_dir: {there} is {what}. Choose another folder, or move it away.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"save.output_dir: nothing can be written in {there} ({error.strerror}). Choose another folder."
        ) from error
    wrong = [folder / name for name in FOLDERS if (folder / name).exists() and not (folder / name).is_dir()]
    wrong += [folder / name for name in FILES if (folder / name).exists() and not (folder / name).is_file()]
    if wrong:
        raise ConfigError(f"save.output_dir: {wrong[0]} is in the way of what the run writes there. Move it away.")
    resume = starting_point(config)
    later = [path for _, path in checkpoints(folder)] if resume is None else []
    if later:
        raise ConfigError(
            f"save.output_dir: {later[-1]} exists, and this run would come to replace it. Go on from it with "
            "save.resume_from_checkpoint=auto, choose another folder, or move it away if it is not needed."
        )


def starting_point(config: Config) -> str | bool | None:
    """The checkpoint that `save.resume_from_checkpoint` names, True for the newest, None for a new run."""
    wanted, output_dir = config.save.resume_from_checkpoint, config.save.output_dir
    if wanted == "auto":
        return newest_complete(output_dir) is not None or None  # the trainer takes it, and moves newer ones aside
    if wanted is not None and not Path(wanted, "trainer_state.json").is_file():
        raise ConfigError(
            f"save.resume_from_checkpoint: {wanted} is no checkpoint (it has no trainer_state.json). Name a folder "
            f"checkpoint-<step>, or `auto` for the newest one in {output_dir}."
        )
    return wanted
