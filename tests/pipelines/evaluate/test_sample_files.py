import numpy as np
import pytest

from pipelines.errors import InputError
from pipelines.evaluate.sample_files import SampleFileWriter, open_sample_file

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)


def test_a_written_file_opens_in_numpy_and_is_memory_mapped(tmp_path):
    path = tmp_path / "deep" / "samples.npz"
    file = SampleFileWriter(path, 12, 16)
    for part in np.split(PIXELS, [5, 6]):
        file.write(part)
    assert not path.exists()  # until it is complete
    file.close()
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"]
        np.testing.assert_array_equal(arrays["arr_0"], PIXELS)
    mapped = open_sample_file(path)
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, PIXELS)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_written_by_numpy_are_read(tmp_path, save):
    save(tmp_path / "adm.npz", PIXELS, np.arange(12))  # ADM's files have labels as arr_1
    np.testing.assert_array_equal(open_sample_file(tmp_path / "adm.npz"), PIXELS)
    save(tmp_path / "fortran.npz", np.asfortranarray(PIXELS))
    np.testing.assert_array_equal(open_sample_file(tmp_path / "fortran.npz"), PIXELS)


def test_missing_and_invalid_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read arr_0"):
        open_sample_file(tmp_path / "missing.npz")
    np.savez(tmp_path / "named.npz", images=PIXELS)
    with pytest.raises(InputError, match="cannot read arr_0"):
        open_sample_file(tmp_path / "named.npz")
    np.savez(tmp_path / "float.npz", PIXELS / 255.0)
    with pytest.raises(InputError, match=r"must be uint8 \(N, H, H, 3\), but is float64 \(12, 16, 16, 3\)"):
        open_sample_file(tmp_path / "float.npz")
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    with pytest.raises(InputError, match="cannot read arr_0"):
        open_sample_file(tmp_path / "objects.npz")
