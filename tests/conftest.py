"""What all tests share: hypothesis draws the same examples every time and never fails for slowness."""

import hypothesis

hypothesis.settings.register_profile("maxnano", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("maxnano")
