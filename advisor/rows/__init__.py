"""Reads training data: files to rows, rows to conversations; used before and during training.

Goes in: a file or folder. Comes out: plain rows, the kind of data, conversations with normalised roles.
Never does: load a machine-learning library, hold a whole file in memory, repair a row silently.
"""

from advisor.rows.conversation import Conversation, Message, RowProblem, consecutive_turns, to_messages
from advisor.rows.formats import FORMATS, detect_format
from advisor.rows.mapping import infer_mapping
from advisor.rows.reading import data_files, read_rows
from advisor.rows.tables import rule_table

__all__ = [
    "FORMATS",
    "Conversation",
    "Message",
    "RowProblem",
    "consecutive_turns",
    "data_files",
    "detect_format",
    "infer_mapping",
    "read_rows",
    "rule_table",
    "to_messages",
]
