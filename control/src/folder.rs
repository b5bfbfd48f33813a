//! What a registered folder configures for itself: `landfall.toml`.
//!
//! ```toml
//! # How to restart, where the container is not Docker's.
//! [restart]
//! stop = ["/usr/local/bin/agent", "stop"]
//! start = ["/usr/local/bin/agent", "start"]
//! preflight = ["agent-check", "--quick"]        # says no by a status other than 0, in its last line of output
//!
//! # Renews a credential daily, where it is needed, and restarts the container when it was.
//! [jobs.renew]
//! command = ["renew-credential", "--file", "secrets.json"]
//! every = "24h"                                 # at least a second; runs at once, too
//! gate = ["renew-credential", "--file", "secrets.json", "--is-due"]    # runs when this ends with status 0
//! timeout = "2m"                                # five minutes, when absent
//! restart = true                                # no, when absent
//!
//! # What the container may replace by `secrets-patch`.
//! [secrets]
//! file = "secrets.json"
//! keys = ["kakaotalk"]
//! ```
//!
//! # Whom these commands are taken from
//!
//! They run on the host, as the daemon's user. The folder is often mounted into the container, writable, and a process in
//! it that is root owns what it writes as the host's root does: nothing about a file says that it is the host user's own
//! word. So the file is read at one moment only, when the host's user registers the folder over the daemon's own socket
//! ([`seal`]), and its text is kept in the registration, out of the container's reach. A container may write to
//! `landfall.toml` whenever it likes; what it writes means nothing until the user registers the folder again, and the
//! journal says that the two differ. For the same reason a command's program must be outside of the folder, wherever its
//! name is found, unless `trust-folder = true` says that nothing in a container writes there. What a program of the host
//! reads in the folder is its own matter: one that executes what it finds there (`make`, `npm run`) undoes all this.
//!
//! The checks at that moment are those of any file that commands are taken from: regular, no link, the daemon's user's or
//! root's, nobody else's to write, of bounded size.

mod command;
mod config;
mod file;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use command::{Command, CommandError, Ended};
pub use config::{Folder, Job, Restart, Secrets};

use crate::registration::model::Registration;

/// The file's name in the folder.
pub const FILE: &str = "landfall.toml";
/// The field of a registration that keeps what was sealed. No client writes it: [`seal`] always replaces it.
const FIELD: &str = "folder";
/// The field by which `run` and `attach` say that their registration lasts as long as they do. Whoever runs a command in
/// a folder has not said that the folder's own commands are to run, so none are.
pub const FOREGROUND: &str = "foreground";

/// How long a job's command may take when its configuration does not say.
pub const JOB_TIMEOUT: Duration = Duration::from_secs(300);

/// Why a folder's configuration is not used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FolderError {
    /// The file is one that commands are not taken from, or cannot be read.
    #[error("{FILE} {0}")]
    File(String),
    /// It says something that means nothing; lines count from one.
    #[error("{FILE} line {line}: {reason}")]
    Line {
        /// Where.
        line: usize,
        /// What.
        reason: String,
    },
}

/// What a registration keeps of its folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Sealed {
    /// The file's text.
    Text(String),
    /// Why there is none, though there is a file.
    Refused(String),
}

/// Takes the folder's configuration into the registration, in place of whatever the registration says about it. To be
/// called when the host's user registers, and at no other time. Reads one small file.
pub fn seal(registration: &mut Registration) {
    registration.unknown.remove(FIELD);
    if let Some(now) = read(registration)
        && let Ok(value) = serde_json::to_value(now)
    {
        registration.unknown.insert(FIELD.to_owned(), value);
    }
}

/// The configuration that was sealed; a folder without one configures nothing.
///
/// # Errors
/// [`FolderError`]: it was refused then, or says something that means nothing.
pub fn sealed(registration: &Registration) -> Result<Folder, FolderError> {
    match kept(registration) {
        None => Ok(Folder::default()),
        Some(Sealed::Refused(reason)) => Err(FolderError::File(reason)),
        Some(Sealed::Text(text)) => Folder::parse(&text),
    }
}

/// Whether the file in the folder is another than the one that was sealed. Reads one small file.
pub fn differs(registration: &Registration) -> bool {
    read(registration) != kept(registration)
}

fn kept(registration: &Registration) -> Option<Sealed> {
    let value = registration.unknown.get(FIELD)?;
    let unreadable = |error: serde_json::Error| Sealed::Refused(format!("was not kept: {error}"));
    Some(serde_json::from_value(value.clone()).unwrap_or_else(unreadable))
}

fn read(registration: &Registration) -> Option<Sealed> {
    if registration.unknown.get(FOREGROUND).and_then(serde_json::Value::as_bool) == Some(true) {
        return None;
    }
    match file::read(&registration.cwd.join(FILE)) {
        Ok(text) => text.map(Sealed::Text),
        Err(reason) => Some(Sealed::Refused(reason)),
    }
}

#[cfg(test)]
#[path = "folder/tests.rs"]
mod tests;
