"""The classes of options that each function takes, in the order of its signature."""

from __future__ import annotations

from streammerge.options.converting import Converting, Extracting
from streammerge.options.merging import Choosing, Merging, Naming, Policies
from streammerge.options.resources import Executing, Machine, Resources, Sharing
from streammerge.options.selecting import Selecting
from streammerge.options.sweeping import Blending, Sweeping
from streammerge.options.telling import Comparing, Gathering, Reporting, Showing, Verifying
from streammerge.options.writing import Finishing, Replacing, Running, Saving, Writing

MERGE = (Merging, Choosing, Naming, Policies, Selecting, Resources, Executing, Writing, Running, Reporting, Gathering)
PLAN = (Merging, Choosing, Naming, Policies, Selecting, Resources, Executing, Writing, Saving)
CONVERT = (Converting, Naming, Selecting, Resources, Executing, Writing, Running)
EXTRACT = (Extracting, Selecting, Resources, Replacing)
VERIFY = (Verifying, Resources)
DIFF = (Comparing, Selecting, Resources, Executing, Reporting)
WORKER = (Sharing, Machine)
FINISH = (Finishing,)
SWEEP = (Sweeping, Blending, Naming, Policies, Selecting, Resources, Executing, Writing, Running)
REPORT = (Showing, Resources)
