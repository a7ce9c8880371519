"""What killed writers leave is swept, and what lives is not."""

from dpo_jax.host import caches


def test_what_a_kill_left_is_swept_but_not_beneath_a_writer(tmp_path):
  names = ("a", "reference_b.npz", "c")
  folder, file, alive = (tmp_path / f".{name}.part" for name in names)
  for path in (folder, alive):
    path.mkdir()
    (path / "part.arrow").write_bytes(b"x")
  file.write_bytes(b"x")
  kept = [tmp_path / ".notes", tmp_path / "a", tmp_path / "reference_b.npz"]
  for path in kept:
    path.touch()
  with caches.lock(tmp_path / "c"):
    caches.sweep(tmp_path)
    assert alive.exists() and not folder.exists() and not file.exists()
  caches.sweep(tmp_path)
  assert not alive.exists() and all(path.exists() for path in kept)


def test_whatever_is_there_is_removed(tmp_path):
  (tmp_path / "folder" / "inner").mkdir(parents=True)
  (tmp_path / "file").touch()
  (tmp_path / "kept").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "kept")
  (tmp_path / "broken").symlink_to(tmp_path / "absent")
  for name in ("folder", "file", "link", "broken", "absent"):
    caches.remove(tmp_path / name)
  assert [path.name for path in tmp_path.iterdir()] == ["kept"]
