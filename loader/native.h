/* setup.py includes this into every C extension: the digest of its sources, which loader/native.py compares. */

__attribute__((used)) static const char srshards_source[] = SRSHARDS_SOURCE;
