/* One long text; a message is a window of it, elsewhere for each connection and each turn, so that an answer to another message is found out. */
#include "load.h"

#include <stdlib.h>
#include <string.h>

#define WINDOWS 61 /* A prime: no cycle of the server's is likely to agree with it. */

static char *text;
static size_t step;

void make_patterns(size_t bytes, size_t line) {
  uint32_t state = 1;
  step = line > 0 ? line : 1; /* Lines stay whole. */
  size_t size = bytes + WINDOWS * step;
  text = malloc(size);
  if (text == NULL) fail("no memory for messages of %zu bytes", bytes);
  for (size_t i = 0; i < size; i++) {
    state = state * 1664525 + 1013904223;
    text[i] = line > 0 && i % line == line - 1 ? '\n' : (char)('a' + (state >> 24) % 26);
  }
}

const char *pattern(int connection, long turn) { return text + (connection + turn) % WINDOWS * step; }

bool is_known_reply(const char *message, size_t offset, const char *data, size_t bytes) {
  static char replies[WINDOWS][MAX_REPLY];
  static size_t known[WINDOWS];
  size_t window = (size_t)(message - text) / step;
  if (offset + bytes > MAX_REPLY || offset > known[window]) return false;
  size_t old = known[window] - offset < bytes ? known[window] - offset : bytes;
  if (memcmp(replies[window] + offset, data, old) != 0) return false;
  memcpy(replies[window] + offset, data, bytes);
  if (known[window] < offset + bytes) known[window] = offset + bytes;
  return true;
}
