/* Included into every kernel by setup.py: what it was built from, for loader/native.py to compare. */

__attribute__((used)) static const char srshards_source[] = SRSHARDS_SOURCE;
