/*
 * load: a closed-loop load generator for echo servers on this machine. It prints
 * one object of JSON, `{"error":...}` if something went wrong, and never hangs.
 *
 *   load mode=echo port=8009 connections=50 bytes=64 seconds=2 server=PID
 */
#include "load.h"

#include <signal.h>
#include <string.h>

/* What opening the connections, warming up and one lost packet may take, besides what is measured. */
#define SPARE_SECONDS 40

int main(int count, char **arguments) {
  Options options = parse_options(count, arguments);
  signal(SIGPIPE, SIG_IGN);
  give_up_after(options.seconds + SPARE_SECONDS);
  if (strcmp(options.mode, "echo") == 0) run_echo(&options);
  else if (strcmp(options.mode, "idle") == 0) run_idle(&options);
  else if (strcmp(options.mode, "stream") == 0) run_stream(&options);
  else if (strcmp(options.mode, "udp") == 0) run_udp(&options);
  else fail("there is no mode %s", options.mode);
  return 0;
}
