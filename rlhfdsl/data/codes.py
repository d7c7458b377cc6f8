"""The codes of the mistakes that data, models' files and tokenizers report, none used twice.

E0630 to E0639 are of blends and edges, E0801 to E0819 of data files, E0840 to E0849 of rendering, E0850 to
E0859 of model directories.
"""

# Blends and edges
UNREADABLE_FORMAT = "E0630"  # a source's format cannot be read the way the stage reads
EMPTY_SHARE = "E0631"  # a source of a mix has no row in the part
NOTHING_LEFT = "E0632"  # every row of an edge was dropped
OTHER_FILE = "E0725"  # a file is not the one that was locked
OTHER_ROWS = "E0726"  # the tokens are not those that the lock was made from

# Data files and hub data sets
FILE_MISSING = "E0801"
FILE_IS_DIRECTORY = "E0802"  # a directory that datasets did not save
UNKNOWN_SUFFIX = "E0803"
FILE_EMPTY = "E0804"  # no byte, or no row
ENCODING = "E0805"  # not UTF-8
BROKEN_JSON = "E0806"
NOT_A_TABLE = "E0807"  # JSON, but no list of objects
BROKEN_TABLE = "E0808"  # a ragged csv, a corrupt parquet file or data set directory
BROKEN_ARCHIVE = "E0809"  # not gzip, or cut short
COLUMN_MISSING = "E0810"
CELL = "E0811"  # null, absent, or of another type
MESSAGES = "E0812"  # a list of messages that is none
TURNS = "E0813"  # turns = hh, and the text has no such turns
NO_PROMPT = "E0814"  # nothing says where the prompt ends
HUB_UNREACHABLE = "E0815"
HUB_DATA = "E0816"  # no such data set, subset, split or revision
SPLIT = "E0817"  # a split that the file or directory does not have
UNREADABLE = "E0818"  # the system refuses to read the file

# Rendering
TEMPLATE = "E0840"  # the chat template refuses a conversation
NOT_A_CONTINUATION = "E0841"  # the template rewrites the prompt when the answer is added

# Models and tokenizers
NO_BITSANDBYTES = "E0823"  # a base in 4 bits, without the package that holds it
NOT_IN_4_BITS = "E0824"  # a model whose layers are not linear layers of matrices
MODEL_MISSING = "E0850"
NOT_A_MODEL = "E0851"
UNSAFE_PICKLE = "E0852"  # weights in .bin form that hold more than tensors, or are damaged
CONFIG = "E0853"
TOKENIZER = "E0854"
HUB_MODEL = "E0855"
WEIGHTS = "E0856"
VOCABULARY = "E0857"  # the tokenizer has ids that the model has no row for
