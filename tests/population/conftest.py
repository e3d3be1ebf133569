import pytest
from garden import BLUEPRINT, EXPERIMENT, Garden


@pytest.fixture(scope="session")
def garden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("garden")
    (folder / "tiny.yaml").write_text(EXPERIMENT)
    (folder / "blueprint.yaml").write_text(BLUEPRINT)
    runs = folder / "runs"
    runs.mkdir()
    return Garden(folder, runs)


@pytest.fixture(scope="session")
def undisturbed(garden):
    """The run that nobody disturbed: what all the others are compared with."""
    return garden.run("undisturbed")
