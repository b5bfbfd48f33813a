//! The environment variables that hold tokens of a container.
//!
//! A verb that runs in such an environment may start the daemon, whose environment `/proc/PID/environ` shows for its
//! whole life, and which its children inherit.

use std::process::Command;

/// The variables of `register`, and those that a container is given (wire specification, A.12).
const VARIABLES: [&str; 6] = [
    "LANDFALL_RESTART_TOKEN",
    "LANDFALL_BROKER_TOKEN",
    "LANDFALL_HOSTD_TOKEN",
    "LANDFALL_HOSTD_BROKER_TOKEN",
    "TYPECLAW_HOSTD_TOKEN",
    "TYPECLAW_HOSTD_BROKER_TOKEN",
];

/// Removes the variables from the environment of a program to start.
pub(crate) fn remove_from(command: &mut Command) -> &mut Command {
    VARIABLES.iter().fold(command, |command, name| command.env_remove(name))
}

/// Whether this process has any of the variables.
pub(crate) fn are_set() -> bool {
    VARIABLES.iter().any(|name| std::env::var_os(name).is_some())
}
