import gc
import importlib.util

import keras
import pytest

from evidence.recipes import ROOT

# A graph is hundreds of thousands of objects: to look through them at every few takes a tenth of the time.
gc.set_threshold(100_000, 50)


# Another data set of the same kind, made by the fixture `other_data`, for each that is embedded.
ANOTHER = {"fashion_mnist_10k": "colour", "lending_club": "table", "shakespeare": "letters"}


def load_module(path):
    """Import the Python file at `path`, anew each time."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave the tests of one file to one process, so that what they share is made once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{item.path.stem}"))


@pytest.fixture(scope="session")
def import_recipe():
    """Return a function that imports a recipe by "THEME/NAME"."""
    return lambda name: load_module(ROOT / "recipes" / f"{name}.py")


@pytest.fixture(autouse=True, scope="session")
def share_programs(tmp_path_factory):
    """On JAX, compile a program once only, though each model of one shape asks for it anew: that halves the time."""
    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def forget_programs():
    """On JAX, free what was compiled: each program takes mappings of memory, which a process has 65,530 of."""
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Forget what the tests of each file have compiled."""
    yield
    forget_programs()


@pytest.fixture(autouse=True)
def free_memory():
    """Forget the models of each test."""
    yield
    keras.utils.clear_session()
    gc.collect()
    # What is left was imported, some 400,000 objects: each garbage collection of all of them takes half a second.
    gc.freeze()
