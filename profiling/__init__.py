"""Where the time and the memory of a run went: spans, traces and what is computed from them."""

if __name__ == "profiling":
    raise ImportError(
        "the repository root is on sys.path and hides Python's own 'profiling' package; "
        "run `pytest`, not `python -m pytest`, or set PYTHONSAFEPATH=1"
    )
