//! The configuration of a registered folder: `landfall.toml`.
//!
//! ```toml
//! # The commands of a restart, for a container that is not in Docker.
//! [restart]
//! stop = ["/usr/local/bin/agent", "stop"]
//! start = ["/usr/local/bin/agent", "start"]
//! preflight = ["agent-check", "--quick"]        # a status other than 0 refuses; the last line of output is the reason
//!
//! # Renews a credential once a day if it is due, and restarts the container after a renewal.
//! [jobs.renew]
//! command = ["renew-credential", "--file", "secrets.json"]
//! every = "24h"                                 # at least a second; the first run is at once
//! gate = ["renew-credential", "--file", "secrets.json", "--is-due"]    # the job runs if this ends with status 0
//! timeout = "2m"                                # default: five minutes
//! restart = true                                # default: false
//!
//! # The parts that the container may replace by `secrets-patch`.
//! [secrets]
//! file = "secrets.json"
//! keys = ["kakaotalk"]
//!
//! # Tools of the host that the container's programs use. A request: only the host's user grants a tool.
//! [tools]
//! wants = ["claude"]
//! ```
//!
//! # When the file has an effect
//!
//! Its commands run on the host, as the daemon's user. The folder is often mounted into the container and writable there,
//! and a root process in the container owns its files as the host's root does; a cloned folder contains text of other
//! authors. Therefore two conditions apply:
//!
//! - The host's user approved exactly the bytes of the file, for this folder (`landfall trust`, [`crate::model::trust`]).
//! - The file was read when the user registered the folder or approved it ([`seal`]). Its text is then stored in the
//!   registration, which the container cannot write. A later change of the file has no effect, and the journal reports it.
//!
//! The file is read once for each of these, and the bytes that were compared with the approval are the ones that are stored.
//! The approval is checked again before each command ([`settings`], [`Command::run`]). Text that was stored without an
//! approval, as by a release that had no approvals, therefore runs no command. A command is killed when the approval of its
//! folder is revoked.
//!
//! A folder without an approval is treated as a folder without a file, with one exception: a table `[secrets]` may be
//! narrower than the default that would apply instead, so `secrets-patch` is refused.
//!
//! The program of a command must be outside of the folder, wherever its name is found, unless `trust-folder = true` declares
//! that no container writes there. A program of the host that executes files of the folder (`make`, `npm run`) gives
//! the container all rights of the user, so review these before you approve them.
//!
//! The file must be regular, not a link, owned by the daemon's user or root, not writable by others, and of bounded size.

mod approved;
mod command;
mod config;
mod demand;
mod file;
mod invocation;
mod withheld;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

pub use approved::{Approvals, Approved};
pub use command::{Command, CommandError, Ended};
pub use config::{Folder, Job, Restart, Secrets, Tools};
pub use demand::{Demand, Purpose};
pub(crate) use invocation::verified;
pub use withheld::{Withheld, withheld};

use crate::model::registration::Registration;
use crate::model::trust::{ContentDigest, FolderFile};
use crate::registry::trust_file::{NotTrusted, TrustFile};

/// The name of the file in the folder.
pub const FILE: &str = FolderFile::Settings.path();
/// The field of a registration that stores the text of an approved file. [`seal`] replaces any value from a client.
const FIELD: &str = "folder";
/// The field that records a file without an approval; [`seal`] replaces it, too. A release without approvals keeps the field
/// and uses no configuration.
const UNTRUSTED_FIELD: &str = "folderUntrusted";
/// The field by which `run` and `attach` mark a registration that ends with them. A command that a user runs in a folder
/// does not use the folder's own commands.
pub const FOREGROUND: &str = "foreground";

/// The default timeout of a job's command.
pub const JOB_TIMEOUT: Duration = Duration::from_secs(300);

/// The reasons why a folder's configuration is not used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FolderError {
    /// The file does not meet the requirements, or cannot be read.
    #[error("{FILE} {0}")]
    File(String),
    /// The file is invalid. Lines count from one.
    #[error("{FILE} line {line}: {reason}")]
    Line {
        /// The line.
        line: usize,
        /// The reason.
        reason: String,
    },
    /// The user did not approve the file.
    #[error("{FILE} {reason}")]
    NotTrusted {
        /// The reason.
        reason: NotTrusted,
        /// Whether the file has a table `[secrets]`.
        secrets: bool,
    },
}

impl FolderError {
    /// Returns whether only an approval is missing. The folder is then treated as one without a file.
    pub fn is_not_trusted(&self) -> bool {
        matches!(self, FolderError::NotTrusted { .. })
    }
}

/// The state of the folder's file that a registration stores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Sealed {
    /// The text of the file.
    Text(String),
    /// The reason why the file was refused.
    Refused(String),
}

/// The record of a file that was not approved when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Untrusted {
    sha256: ContentDigest,
    /// Whether it has a table `[secrets]`.
    secrets: bool,
}

/// Reads the folder's file into the registration, in place of its stored state: the text if these bytes are approved, else
/// only a record that a file exists. Called when the host's user registers or approves. Reads small files.
pub fn seal(registration: &mut Registration, trust: &TrustFile) {
    registration.unknown.remove(FIELD);
    registration.unknown.remove(UNTRUSTED_FIELD);
    let (field, value) = match read(registration) {
        None => return,
        Some(Err(reason)) => (FIELD, serde_json::to_value(Sealed::Refused(reason))),
        Some(Ok(text)) => {
            let sha256 = ContentDigest::of(text.as_bytes());
            if check(registration, &sha256, trust).is_ok() {
                (FIELD, serde_json::to_value(Sealed::Text(text)))
            } else {
                match Folder::parse(&text) {
                    Ok(folder) if folder.demands().is_empty() => return,
                    Ok(folder) => {
                        let untrusted = Untrusted { sha256, secrets: folder.secrets.is_some() };
                        (UNTRUSTED_FIELD, serde_json::to_value(untrusted))
                    }
                    Err(error) => (FIELD, serde_json::to_value(Sealed::Refused(reason_of(error)))),
                }
            }
        }
    };
    if let Ok(value) = value {
        registration.unknown.insert(field.to_owned(), value);
    }
}

/// Reads the folder's file into a registration without an approved text, if the file is approved by now: the user may have
/// approved it while no daemon ran. Returns whether the registration changed. Reads small files.
pub fn seal_if_approved(registration: &mut Registration, trust: &TrustFile) -> bool {
    let is_approved = |text: &str| check(registration, &ContentDigest::of(text.as_bytes()), trust).is_ok();
    if matches!(kept(registration), Some(Sealed::Text(text)) if is_approved(&text)) {
        return false;
    }
    let Some(Ok(text)) = read(registration) else { return false };
    let Ok(value) = serde_json::to_value(Sealed::Text(text.clone())) else { return false };
    if !is_approved(&text) {
        return false;
    }
    registration.unknown.remove(UNTRUSTED_FIELD);
    registration.unknown.insert(FIELD.to_owned(), value);
    true
}

/// Returns the settings that a registration stores, if they are approved now. A folder without a file has default settings.
/// Reads small files.
///
/// # Errors
/// [`FolderError`] if the file was refused, is invalid, or is not approved.
pub fn settings(registration: &Registration, approvals: &Approvals) -> Result<Approved, FolderError> {
    let text = match kept(registration) {
        Some(Sealed::Text(text)) => text,
        Some(Sealed::Refused(reason)) => return Err(FolderError::File(reason)),
        None => {
            return match untrusted(registration) {
                None => Ok(Approved::empty()),
                Some(Untrusted { sha256, secrets }) => {
                    // Without an error, the file has been approved since, but has not been read again.
                    let reason = check(registration, &sha256, approvals.file()).err();
                    let reason = reason.unwrap_or(NotTrusted::NotApproved);
                    Err(FolderError::NotTrusted { reason, secrets })
                }
            };
        }
    };
    let folder = Folder::parse(&text)?;
    let sha256 = ContentDigest::of(text.as_bytes());
    match check(registration, &sha256, approvals.file()) {
        Ok(path) => Ok(Approved::new(folder, path, &text, approvals)),
        Err(_) if folder.demands().is_empty() => Ok(Approved::empty()),
        Err(reason) => Err(FolderError::NotTrusted { reason, secrets: folder.secrets.is_some() }),
    }
}

/// Returns whether the file in the folder differs from the one that was read for the registration. Reads one small file.
pub fn differs(registration: &Registration) -> bool {
    let kept = kept(registration);
    match (read(registration), &kept, untrusted(registration)) {
        (Some(Ok(text)), None, Some(untrusted)) => ContentDigest::of(text.as_bytes()) != untrusted.sha256,
        (Some(Ok(text)), None, None) => !Folder::parse(&text).is_ok_and(|folder| folder.demands().is_empty()),
        (Some(Ok(text)), Some(Sealed::Text(kept)), _) => text != *kept,
        (Some(Ok(text)), Some(Sealed::Refused(_)), _) => Folder::parse(&text).is_ok(),
        (Some(Err(reason)), kept, _) => *kept != Some(Sealed::Refused(reason)),
        (None, kept, untrusted) => kept.is_some() || untrusted.is_some(),
    }
}

/// Checks the approval of a content of a registration's file. Returns the canonical folder.
fn check(
    registration: &Registration,
    content: &ContentDigest,
    trust: &TrustFile,
) -> Result<PathBuf, NotTrusted> {
    // A folder that cannot be resolved was not approved.
    let folder = registration.cwd.canonicalize().map_err(|_| NotTrusted::NotApproved)?;
    trust.check(&folder, FolderFile::Settings, content).map(|()| folder)
}

/// Returns the reason without the file name as its prefix.
fn reason_of(error: FolderError) -> String {
    match error {
        FolderError::File(reason) => reason,
        FolderError::Line { line, reason } => format!("line {line}: {reason}"),
        FolderError::NotTrusted { reason, .. } => reason.to_string(),
    }
}

fn kept(registration: &Registration) -> Option<Sealed> {
    let value = registration.unknown.get(FIELD)?;
    let unreadable = |error: serde_json::Error| Sealed::Refused(format!("could not be stored: {error}"));
    Some(serde_json::from_value(value.clone()).unwrap_or_else(unreadable))
}

fn untrusted(registration: &Registration) -> Option<Untrusted> {
    serde_json::from_value(registration.unknown.get(UNTRUSTED_FIELD)?.clone()).ok()
}

fn read(registration: &Registration) -> Option<Result<String, String>> {
    if registration.unknown.get(FOREGROUND).and_then(Value::as_bool) == Some(true) {
        return None;
    }
    read_file(&registration.cwd).transpose()
}

/// Reads a folder's file, if it exists.
///
/// # Errors
/// The reason, without the file name as its prefix.
pub fn read_file(folder: &Path) -> Result<Option<String>, String> {
    file::read(&folder.join(FILE))
}

#[cfg(test)]
pub(crate) mod test_support;

#[cfg(test)]
mod tests;
