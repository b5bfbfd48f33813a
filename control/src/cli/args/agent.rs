//! The arguments of the program inside a container.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use jiff::SignedDuration;

use crate::agent::local::{CANDIDATES_MAX, WAIT_MAX};

pub(super) const AGENT_NOTES: &str = "\
Run it inside the container. It needs no privileges, no capabilities and no other files. It reads
the broker token from LANDFALL_HOSTD_BROKER_TOKEN, or else from TYPECLAW_HOSTD_BROKER_TOKEN;
without a token it opens no WebSocket. A host directory mounted at /run/landfall is the fastest
path for connections: see --directory.

Events are written to standard error as JSON, one object per line. SIGTERM ends the agent.

Example: landfall agent &";

const FORWARD_NOTES: &str = "\
Prints only the port. The agent remembers the request and repeats it whenever a host connects, so
the port may still open after this command has timed out.

Exit codes: 6 the host refused; 5 no agent runs here, or no host is connected to it; 124 no
answer in time

Example: PORT=$(landfall agent forward 4848 --host 4848-4857 --reason dashboard)";

const RESTART_NOTES: &str = "\
Sends the request to the daemon at the socket in LANDFALL_HOSTD_SOCKET, or else to
LANDFALL_HOSTD_URL, with the token in LANDFALL_HOSTD_TOKEN. The daemon answers before it stops the
container.

Exit codes: 4 the token does not belong to this container; 5 no daemon; 6 the daemon refused; 124
no answer in time

Example: landfall agent restart";

/// `landfall agent`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct AgentArgs {
    /// A request to the running agent.
    #[command(subcommand)]
    pub verb: Option<AgentVerb>,
    /// The options of the agent itself.
    #[command(flatten)]
    pub serve: AgentServeArgs,
}

/// The requests to the running agent.
#[derive(Debug, Subcommand)]
pub enum AgentVerb {
    /// Request a host port that leads to a port of this container, and print the host port
    #[command(after_help = FORWARD_NOTES)]
    Forward(AgentForwardArgs),
    /// Ask the daemon on the host to restart this container
    #[command(after_help = RESTART_NOTES)]
    Restart(AgentRestartArgs),
}

/// The options of an agent.
#[derive(Debug, Args)]
pub struct AgentServeArgs {
    /// The port of its WebSocket; hosts expect 8973, and 0 picks a free port
    #[arg(long, default_value_t = crate::agent::PORT)]
    pub port: u16,
    /// The address of its WebSocket [default: all addresses]
    #[arg(long, value_name = "ADDRESS")]
    pub bind: Option<IpAddr>,
    /// A directory shared with the host, through which the daemon receives sockets [default: /run/landfall, if it
    /// exists and is writable]
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
    /// How often to scan for listening sockets
    #[arg(long, default_value = "500ms", value_name = "TIME", value_parser = parse_interval)]
    pub interval: Duration,
}

/// `landfall agent forward`
#[derive(Debug, Args)]
pub struct AgentForwardArgs {
    /// The port in this container; a server may start to listen there later
    pub port: NonZeroU16,
    /// Candidate ports on the host, in order of preference: 4848,5000-5009 [default: the same port]
    #[arg(long, value_name = "PORTS", value_parser = parse_candidates)]
    pub host: Option<Candidates>,
    /// The purpose of the port; the agent sends it to the host
    #[arg(long, value_name = "TEXT", value_parser = parse_reason)]
    pub reason: Option<String>,
    /// How long to wait for the host's answer
    #[arg(long, default_value = "10", value_name = "SECONDS", value_parser = parse_wait)]
    pub wait: Duration,
    /// The port of the agent
    #[arg(long = "agent-port", default_value_t = crate::agent::PORT, value_name = "PORT")]
    pub agent_port: u16,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall agent restart`
#[derive(Debug, Args)]
pub struct AgentRestartArgs {
    /// Build the image of this container first; this needs the right `rebuild` (landfall grant --help)
    #[arg(long)]
    pub build: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Ports on the host in order of preference, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidates(pub Vec<NonZeroU16>);

fn parse_interval(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<SignedDuration>().ok().and_then(|length| Duration::try_from(length).ok());
    let range = Duration::from_millis(10)..=Duration::from_secs(3600);
    parsed.filter(|length| range.contains(length)).ok_or_else(|| "give a time from 10ms to 1h".to_owned())
}

fn parse_wait(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    parsed.filter(|wait| *wait <= WAIT_MAX).ok_or_else(|| "give seconds, up to 86400 (one day)".to_owned())
}

/// Limits the reason to the length that the agent accepts.
fn parse_reason(text: &str) -> Result<String, String> {
    if text.len() <= 1024 { Ok(text.to_owned()) } else { Err("the limit is 1024 bytes".to_owned()) }
}

fn parse_candidates(text: &str) -> Result<Candidates, String> {
    let port = |text: &str| {
        text.trim().parse::<NonZeroU16>().map_err(|_| format!("\"{text}\" is not a port from 1 to 65535"))
    };
    let mut candidates = Vec::new();
    for part in text.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(part)?, port(part)?),
        };
        if last < first {
            return Err(format!("the range {first}-{last} ends before it starts"));
        }
        for port in (first.get()..=last.get()).filter_map(NonZeroU16::new) {
            if !candidates.contains(&port) {
                candidates.push(port);
            }
            if candidates.len() > CANDIDATES_MAX {
                return Err(format!("the limit is {CANDIDATES_MAX} ports"));
            }
        }
    }
    Ok(Candidates(candidates))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(text: &str) -> Result<Vec<u16>, String> {
        parse_candidates(text).map(|list| list.0.into_iter().map(NonZeroU16::get).collect())
    }

    #[test]
    fn candidates_keep_their_order_without_duplicates() {
        assert_eq!(candidates("4850,4848-4851"), Ok(vec![4850, 4848, 4849, 4851]));
        for wrong in ["", "0", "1,,2", "x", "70000", "5-", "9-8", "1-2-3"] {
            assert!(candidates(wrong).is_err(), "{wrong}");
        }
        assert!(candidates("1-65535").is_err());
    }

    #[test]
    fn times_outside_their_bounds_are_rejected() {
        assert_eq!(parse_interval("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_wait("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0s", "1ms", "2h", "-1s", "soon", "9"] {
            assert!(parse_interval(wrong).is_err(), "{wrong}");
        }
        for wrong in ["-1", "NaN", "inf", "1e9", "x"] {
            assert!(parse_wait(wrong).is_err(), "{wrong}");
        }
    }
}
