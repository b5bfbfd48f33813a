//! The options of native sockets of `landfall run`: servers in a sandbox that listen on sockets of the host, without
//! the relay. Pure.
//!
//! The engine's [`native`](landfall_engine::native) module does the work, on a thread of the `run` process. The
//! supervisor's reports go to the daemon if one runs, else to the planner in the `run` process.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::model::registration::Registration;

/// The field of a registration whose ports may be native, so that the planner waits for the supervisor's report before
/// it relays a port.
pub const FIELD: &str = "nativeSockets";

/// The environment variable with the default of `--sockets`.
pub const VARIABLE: &str = "LANDFALL_SOCKETS";

/// Whether a registration has the field.
pub fn is_announced(registration: &Registration) -> bool {
    registration.unknown.get(FIELD).and_then(serde_json::Value::as_bool) == Some(true)
}

/// How the servers of a sandbox listen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sockets {
    /// Native if the kernel allows it, else relayed.
    #[default]
    Auto,
    /// Native; an error if that is not possible.
    Native,
    /// Relayed.
    Relay,
}

impl Sockets {
    /// The value of the option.
    pub fn as_str(self) -> &'static str {
        match self {
            Sockets::Auto => "auto",
            Sockets::Native => "native",
            Sockets::Relay => "relay",
        }
    }
}

/// The behaviour if a server's port is in use on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnConflict {
    /// `listen` fails, so that a dev server takes the next port.
    Fail,
    /// The server listens in the sandbox; the port is forwarded when it is free.
    Relay,
}
