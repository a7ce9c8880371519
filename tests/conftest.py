"""Eight CPU devices, strict shapes, and the folder of real data."""

import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    # Eight devices on two busy cores may wait long for each other.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
  ]
)
# What one test compiled the others, and the commands they start, find.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="dpo_jax_programs")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _PROGRAMS.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

# JAX reads the environment when it is first imported.
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def programs_of_this_file_only():
  """Lets go of compiled programs, of which a worker would hold gigabytes."""
  yield
  jax.clear_caches()


REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def _shared_dir() -> pathlib.Path:
  return pathlib.Path(
    os.environ.get("DPO_JAX_SHARED", REPOSITORY.parent / "shared")
  )


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
  """The folder of real data and golden runs; tests that need it skip."""
  folder = _shared_dir()
  if not (folder / "data").is_dir():
    pytest.skip(f"no real data at {folder}: set DPO_JAX_SHARED")
  return folder
