#include "load.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

void fail(const char *format, ...) {
  char message[256];
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  for (char *at = message; *at != '\0'; at++) {
    if (*at == '"' || *at == '\\' || (unsigned char)*at < ' ') *at = '\'';
  }
  printf("{\"error\":\"%s\"}\n", message);
  exit(1);
}

void print_figures(const Figure *figures) {
  const char *before = "{";
  for (; figures->name != NULL; figures++) {
    /* JSON has no NaN: what was not measured is left out. */
    if (!isfinite(figures->value)) continue;
    printf("%s\"%s\":%.6g", before, figures->name, figures->value);
    before = ",";
  }
  printf("}\n");
}
