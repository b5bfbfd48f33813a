//! The arguments of the program inside a container.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use jiff::SignedDuration;

use crate::agent::local::{CANDIDATES_MAX, WAIT_MAX};

pub(super) const AGENT_NOTES: &str = "\
Run it inside the container: it needs no privilege, no capability and nothing but itself. The
broker token is taken from LANDFALL_HOSTD_BROKER_TOKEN, else TYPECLAW_HOSTD_BROKER_TOKEN; without
one there is no WebSocket. A directory of the host that is mounted at /run/landfall is the fast
way: see --directory.

What happens is told as JSON on standard error, one object a line. SIGTERM ends it.

Example: landfall agent &";

const FORWARD_NOTES: &str = "\
The port is printed, and nothing else. The agent remembers what was asked for and asks again
whenever a host connects, so a port that is not there in time may still come.

Exit codes: 6 the host refuses; 5 no agent runs here, or no host is connected to it; 124 no
answer in time

Example: PORT=$(landfall agent forward 4848 --host 4848-4857 --reason dashboard)";

const RESTART_NOTES: &str = "\
The daemon is asked over the socket that LANDFALL_HOSTD_SOCKET names, else at LANDFALL_HOSTD_URL, with
the token in LANDFALL_HOSTD_TOKEN. It answers before it stops the container.

Exit codes: 4 the token is not this container's; 5 no daemon; 6 the daemon refuses; 124 no answer in
time

Example: landfall agent restart";

/// `landfall agent`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct AgentArgs {
    /// Something to ask of the agent that runs.
    #[command(subcommand)]
    pub verb: Option<AgentVerb>,
    /// Where it runs.
    #[command(flatten)]
    pub serve: AgentServeArgs,
}

/// What can be asked of the agent that runs.
#[derive(Debug, Subcommand)]
pub enum AgentVerb {
    /// Ask for a port of the host that leads to a port of this container, and print it
    #[command(after_help = FORWARD_NOTES)]
    Forward(AgentForwardArgs),
    /// Ask the daemon on the host to restart this container
    #[command(after_help = RESTART_NOTES)]
    Restart(AgentRestartArgs),
}

/// How an agent serves.
#[derive(Debug, Args)]
pub struct AgentServeArgs {
    /// The port of its WebSocket; hosts expect 8973, and 0 takes any free one
    #[arg(long, default_value_t = crate::agent::PORT)]
    pub port: u16,
    /// The address of its WebSocket [default: every address]
    #[arg(long, value_name = "ADDRESS")]
    pub bind: Option<IpAddr>,
    /// A directory shared with the host, where its daemon fetches sockets [default: /run/landfall, if
    /// that is there and can be written to]
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
    /// How often to look what listens
    #[arg(long, default_value = "500ms", value_name = "TIME", value_parser = parse_interval)]
    pub interval: Duration,
}

/// `landfall agent forward`
#[derive(Debug, Args)]
pub struct AgentForwardArgs {
    /// The port in this container; nothing has to listen there yet
    pub port: NonZeroU16,
    /// Ports on the host, the best first: 4848,5000-5009 [default: the same port]
    #[arg(long, value_name = "PORTS", value_parser = parse_candidates)]
    pub host: Option<Candidates>,
    /// What it is for; the host is told
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
    /// Build the image of this container first; that takes the right `rebuild` (landfall grant --help)
    #[arg(long)]
    pub build: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Ports on the host, the best first, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidates(pub Vec<NonZeroU16>);

fn parse_interval(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<SignedDuration>().ok().and_then(|length| Duration::try_from(length).ok());
    let range = Duration::from_millis(10)..=Duration::from_secs(3600);
    parsed.filter(|length| range.contains(length)).ok_or_else(|| "say a time from 10ms to 1h".to_owned())
}

fn parse_wait(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    parsed.filter(|wait| *wait <= WAIT_MAX).ok_or_else(|| "say seconds, up to a day".to_owned())
}

/// What the host is told is bounded by what the agent takes.
fn parse_reason(text: &str) -> Result<String, String> {
    if text.len() <= 1024 { Ok(text.to_owned()) } else { Err("say it in 1024 bytes".to_owned()) }
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
            return Err(format!("the range {first}-{last} ends before it begins"));
        }
        for port in (first.get()..=last.get()).filter_map(NonZeroU16::new) {
            if !candidates.contains(&port) {
                candidates.push(port);
            }
            if candidates.len() > CANDIDATES_MAX {
                return Err(format!("more than {CANDIDATES_MAX} ports are too many"));
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
    fn candidates_keep_their_order_and_come_once() {
        assert_eq!(candidates("4850,4848-4851"), Ok(vec![4850, 4848, 4849, 4851]));
        for wrong in ["", "0", "1,,2", "x", "70000", "5-", "9-8", "1-2-3"] {
            assert!(candidates(wrong).is_err(), "{wrong}");
        }
        assert!(candidates("1-65535").is_err());
    }

    #[test]
    fn times_have_bounds() {
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
