"""What is computed once and kept: a store gives back what was put into it, or says what is wrong; a key knows all that its content depends on."""
import os
import pickle
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from llb.core.arrays import build_store, open_store
from llb.core.errors import InputError
from llb.core.files import atomic

COLUMNS = {"label": ("int64", ()), "image": ("uint8", (3, 50, 31))}
ROWS = 12


def rows_of(rows):
    "The true content of some rows."
    images = [np.random.default_rng(row).integers(0, 256, (3, 50, 31), dtype=np.uint8) for row in rows]
    return {"label": np.array(list(rows)), "image": np.stack(images)}


def opened(folder, **about): return open_store(folder, {"seed": 0, **about}, COLUMNS, ROWS, "example")


@pytest.fixture
def store(tmp_path):
    "A whole store."
    store = opened(tmp_path)
    store.put(range(ROWS), **rows_of(range(ROWS)))
    store.flush()
    return store


def same(store, rows=range(ROWS)):
    "Whether some rows hold what they must."
    for row in rows:
        found, wanted = store.get(row), rows_of([row])
        if not all(np.array_equal(found[name], wanted[name][0]) for name in COLUMNS): return False
    return True


def change(path, place, change):
    "Change the bytes of a file from `place` on."
    content = bytearray(path.read_bytes())
    found = content[place:place + 64]
    content[place:place + 64] = change(bytes(found))
    path.write_bytes(content)


def test_a_store_gives_back_what_was_put(store, tmp_path):
    assert same(store) and same(pickle.loads(pickle.dumps(store))) and len(pickle.dumps(store)) < 500
    assert np.array_equal(store["image"], rows_of(range(ROWS))["image"]) and not store["image"].flags.writeable
    assert opened(tmp_path).folder == store.folder != opened(tmp_path, seed=1).folder and not len(opened(tmp_path).missing())
    with pytest.raises(InputError, match="no column 'nope'; there are label, image"): store["nope"]


ROW = 3 * 50 * 31
DAMAGES = {
    "bit": lambda f: change(f / "image.bin", 4 * ROW + 999, lambda b: bytes([b[0] ^ 128]) + b[1:]),
    "zeros": lambda f: change(f / "image.bin", 4 * ROW, lambda b: bytes(64)),
    "other order": lambda f: change(f / "image.bin", 4 * ROW, lambda b: b[8:16] + b[:8] + b[16:]),
    "another row": lambda f: change(f / "label.bin", 4 * 8, lambda b: b[8:16] + b[8:]),
    "check": lambda f: change(f / "checks.bin", 4 * 8, lambda b: bytes([b[0] ^ 1]) + b[1:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_is_refused_and_made_anew(damage, store, tmp_path):
    "With all others that are damaged."
    change(store.folder / "image.bin", 7 * ROW + 5, lambda b: b[1:] + b[:1])
    DAMAGES[damage](store.folder)
    with pytest.raises(InputError, match="Row 4 of the example .* damaged; start again"): store.get(4)
    again = opened(tmp_path)
    assert again.missing().tolist() == [4, 7] and same(again, [0, 1, 2, 3, 5, 6, 8, 9, 10, 11])
    again.put([4, 7], **rows_of([4, 7]))
    assert same(opened(tmp_path)) and not (store.folder / "damaged").exists()


def test_files_of_zeros_are_missing_rows(store, tmp_path):
    "What a power cut can leave of files that were renamed before they were on the disk."
    for name in "image.bin", "label.bin", "checks.bin":
        path = store.folder / name
        path.write_bytes(bytes(path.stat().st_size))
    assert opened(tmp_path).missing().tolist() == list(range(ROWS))


@pytest.mark.parametrize("name, kept", [("image.bin", 5), ("label.bin", 5), ("checks.bin", 5), ("image.bin", 0), ("about.json", ROWS)])
def test_truncated_files_are_mended_at_the_next_start(name, kept, store, tmp_path):
    path = store.folder / name
    os.truncate(path, path.stat().st_size * kept // ROWS if kept < ROWS else 9)
    again = opened(tmp_path)
    assert again.missing().tolist() == list(range(kept, ROWS)) and same(again, range(kept))


def test_a_store_truncated_while_it_is_read_ends_nothing(store):
    os.truncate(store.folder / "image.bin", 6 * ROW)
    assert same(store, range(6))
    with pytest.raises(InputError, match="Row 6 of the example"): store.get(6)


def test_a_missing_file_or_store(store, tmp_path):
    (store.folder / "image.bin").unlink()
    assert opened(tmp_path).missing().tolist() == list(range(ROWS))
    with pytest.raises(InputError, match="no stored arrays"): pickle.loads(pickle.dumps(store)).__class__(tmp_path)


def test_a_disk_without_room(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("llb.core.arrays.shutil.disk_usage", lambda path: usage(0, 0, 4096))
    with pytest.raises(InputError, match="The example cannot be kept in .* needs .* GB more, but .* are free. Set LLB_CACHE"): opened(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="The example cannot be kept in .*: Not a directory"): opened(tmp_path / "file")


def test_room_is_reserved(tmp_path):
    file = opened(tmp_path).folder / "image.bin"
    assert file.stat().st_blocks * 512 >= file.stat().st_size == ROWS * ROW


def test_building_goes_on_with_whole_batches(tmp_path):
    "A batch that was torn is computed again as a whole: numbers don't depend on where it was interrupted."
    done = []
    def fill(store, batches):
        for rows in batches:
            if len(done) == 2: raise KeyboardInterrupt
            store.put(rows, **rows_of(rows))
            done.append(list(rows))
    with pytest.raises(KeyboardInterrupt): build_store(lambda: opened(tmp_path), fill, 5)
    store = opened(tmp_path)
    assert store.missing().tolist() == [10, 11]
    DAMAGES["check"](store.folder)
    with pytest.raises(InputError): store.get(4)
    done.clear()
    assert same(build_store(lambda: opened(tmp_path), fill, 5)) and done == [[0, 1, 2, 3, 4], [10, 11]]


WRITER = """
import sys, time, numpy as np
from llb.core.arrays import ArrayStore
store, first = ArrayStore(sys.argv[1]), int(sys.argv[2])
for row in range(first, 12, 3):
    images = np.random.default_rng(row).integers(0, 256, (3, 50, 31), dtype=np.uint8)
    store.put([row], label=[row], image=images[None])
    time.sleep(.01)
store.flush()
"""


def test_processes_write_rows_of_their_own(tmp_path):
    folder = opened(tmp_path).folder
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, folder, str(i)]) for i in range(3)]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    assert same(opened(tmp_path))


# Files that appear at once

def test_atomic_leaves_the_old_or_the_new(tmp_path):
    file, folder = tmp_path / "a.txt", tmp_path / "sub"
    for text in "old", "new":
        with atomic(file) as made: made.write_text(text)
        with atomic(folder, folder=True) as made: (made / text).write_text(text)
    for path, is_folder in (file, False), (folder, True):
        with pytest.raises(KeyboardInterrupt), atomic(path, is_folder) as made:
            (made / "torn" if is_folder else made).write_text("torn")
            raise KeyboardInterrupt
    assert file.read_text() == "new" and [p.name for p in folder.iterdir()] == ["new"]
    assert sorted(Path(tmp_path).iterdir()) == [file, folder]
