/**
 * What the programs of both sides are asked to do, and where the two differ on purpose.
 *
 * @module
 */

// --- Kinds of servers

/** A server of Python's and ours. */
export interface Kind {
  readonly python: string;
  readonly here: string;
  readonly transport: "tcp" | "unix" | "udp" | "unixpacket";
  /** Whether it serves one client after the other. */
  readonly oneByOne: boolean;
}

export const KINDS: Kind[] = [
  { python: "TCPServer", here: "TcpServer with maxConnections: 1", transport: "tcp", oneByOne: true },
  { python: "ThreadingTCPServer", here: "TcpServer", transport: "tcp", oneByOne: false },
  { python: "UnixStreamServer", here: "UnixServer with maxConnections: 1", transport: "unix", oneByOne: true },
  { python: "ThreadingUnixStreamServer", here: "UnixServer", transport: "unix", oneByOne: false },
  { python: "UDPServer", here: "UdpServer with maxConcurrent: 1", transport: "udp", oneByOne: true },
  { python: "ThreadingUDPServer", here: "UdpServer", transport: "udp", oneByOne: false },
  {
    python: "UnixDatagramServer",
    here: "UnixDatagramServer with maxConcurrent: 1",
    transport: "unixpacket",
    oneByOne: true,
  },
  { python: "ThreadingUnixDatagramServer", here: "UnixDatagramServer", transport: "unixpacket", oneByOne: false },
];

/** Whose server it is. */
export type Side = "python" | "here";

export const isOneByOne = (kind: Kind) => kind.oneByOne;
export const isSideBySide = (kind: Kind) => !kind.oneByOne;
export const isDatagram = (kind: Kind) => kind.transport === "udp" || kind.transport === "unixpacket";
export const isUdp = (kind: Kind) => kind.transport === "udp";
export const isTcp = (kind: Kind) => kind.transport === "tcp";
export const inPython = (_kind: Kind, side: Side) => side === "python";
export const inPythonOneByOne = (kind: Kind, side: Side) => kind.oneByOne && side === "python";
export const whereHandlersAreWaitedFor = (kind: Kind, side: Side) => kind.oneByOne || side === "here";

// --- Scenarios

/** What a server is told to do; it answers with "CALL returned" or "CALL throws WHAT". */
export type Call =
  | "serve_forever"
  | "shutdown"
  | "server_close"
  | "handle_request"
  | "with"
  | "aside"
  | "remember descriptors"
  | "compare descriptors"
  | "count handlers"
  | "fail to bind"
  | "start and stop 20";

/** What a client does, or the server is told to. Whoever waits, waits for a bounded time. */
export type Step =
  | readonly [client: string, step: "connects" | "half-closes" | "closes" | "reads to the end"]
  /** Closes with bytes unread, which the peer sees as a reset. */
  | readonly [client: string, step: "resets"]
  /** Connects and resets at once, in one program that the test waits for. */
  | readonly [client: string, step: "comes and resets"]
  | readonly [client: string, step: "sends", data: string | Uint8Array]
  | readonly [client: string, step: "reads", count: number]
  | readonly [client: string, step: "is past", hook: string, times?: number]
  | readonly ["server", "listens"]
  /** Begins a call. */
  | readonly ["server", "begins", call: Call, more?: { timeout: number }]
  /** Begins a call and waits for its end. */
  | readonly ["server", "does", call: Call, more?: { timeout: number }]
  /** Tells whether a call that has begun comes to its end; where it is expected to go on, it is watched for a moment only. */
  | readonly ["server", "is asked about", call: Call, goesOn: (kind: Kind, side: Side) => boolean]
  /** Makes a new server at the address of the first. */
  | readonly ["server", "restarts"]
  /** Tells whether a new client is let in. */
  | readonly ["server", "is dialed"];

/** Lines of the transcript that only one side has, and why. */
export interface Difference {
  readonly on?: (kind: Kind) => boolean;
  readonly reason: string;
  readonly python: string[];
  readonly here: string[];
}

export interface Scenario {
  /** Whether it is for servers of datagrams; else it is for servers of streams. */
  readonly datagrams?: boolean;
  readonly name: string;
  readonly on?: (kind: Kind) => boolean;
  /** A handler of both model programs. */
  readonly handler: string;
  /** What their servers' own hooks do. */
  readonly quirk?: string;
  /** Whether the steps start the server; else it serves already. */
  readonly manual?: boolean;
  /** Whether the order of hooks is compared over all clients too. */
  readonly ordered?: boolean;
  readonly steps: Step[];
  readonly differs?: Difference[];
}
export const MEGABYTE = new Uint8Array(1_048_576).fill("x".charCodeAt(0));

/** The hooks of a connection that is served, up to the end of its handler. */
export const SERVED = "get_request verify_request process_request finish_request setup handle finish";

/** And those after it. Both are closeRequest() here. */
export const CLOSED = "shutdown_request close_request";
