#include "load.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
  const char *name;
  double *number;
  const char **text;
} Option;

static void set(const Option *option, const char *name, const char *value) {
  char *end;
  if (option->text != NULL) {
    *option->text = value;
    return;
  }
  *option->number = strtod(value, &end);
  if (*value == '\0' || *end != '\0' || !(*option->number >= 0)) fail("%s is no number", name);
}

/* The value in NAME=VALUE, or NULL if it is another option's. */
static const char *value_of(const char *argument, const char *name) {
  size_t length = strlen(name);
  if (strncmp(argument, name, length) != 0 || argument[length] != '=') return NULL;
  return argument + length + 1;
}

Options parse_options(int count, char **arguments) {
  Options options = {.mode = "", .connections = 1, .bytes = 64, .seconds = 1, .silence = 1};
  const Option known[] = {
      {"mode", NULL, &options.mode},
      {"path", NULL, &options.path},
      {"port", &options.port, NULL},
      {"tls", &options.tls, NULL},
      {"server", &options.server, NULL},
      {"connections", &options.connections, NULL},
      {"bytes", &options.bytes, NULL},
      {"reply", &options.reply, NULL},
      {"line", &options.line, NULL},
      {"exchanges", &options.exchanges, NULL},
      {"newcomers", &options.newcomers, NULL},
      {"seconds", &options.seconds, NULL},
      {"silence", &options.silence, NULL},
  };
  const size_t known_count = sizeof known / sizeof *known;
  for (int i = 1; i < count; i++) {
    size_t j = 0;
    while (j < known_count && value_of(arguments[i], known[j].name) == NULL) j++;
    if (j == known_count) fail("there is no option %s", arguments[i]);
    set(&known[j], arguments[i], value_of(arguments[i], known[j].name));
  }
  if (options.connections < 1 || options.bytes < 1) fail("there is nothing to send");
  if (options.reply > MAX_REPLY) fail("an answer that is not an echo has %d bytes at most", MAX_REPLY);
  if (options.line > 0 && (size_t)options.bytes % (size_t)options.line != 0) fail("a message has whole lines");
  return options;
}
