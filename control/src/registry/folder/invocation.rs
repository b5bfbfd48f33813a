//! Prepares a command of a folder in the process that has the privileges for it: the daemon, or the launcher of a root
//! daemon. The launcher checks the approval itself and does not rely on the daemon ([`verified`]).

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Demand, Folder};
use crate::model::trust::{ContentDigest, FolderFile};
use crate::registry::trust_file::TrustFile;
use crate::sys::launcher::{Invocation, Refusal};

/// The search path for programs if PATH is not set.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Checks that a command is part of approved settings of its folder. Returns the process to start, which writes to `output`.
///
/// # Errors
/// [`Refusal`].
pub(crate) fn verified(
    invocation: &Invocation,
    settings: &str,
    trust: &TrustFile,
    output: OwnedFd,
) -> Result<Command, Refusal> {
    let content = ContentDigest::of(settings.as_bytes());
    // Check first: text that is not approved is not parsed.
    let approved = trust.check(&invocation.folder, FolderFile::Settings, &content);
    let folder = approved.ok().and_then(|()| Folder::parse(settings).ok()).ok_or(Refusal::NotApproved)?;
    let is_requested_command =
        |demand: &Demand<'_>| matches!(demand, Demand::Command { words, .. } if **words == *invocation.words);
    if !folder.demands().iter().any(is_requested_command) {
        return Err(Refusal::NotApproved);
    }
    command(invocation, folder.trust_folder, output)
}

/// Returns the process of a command: in the folder, in its own process group, with a minimal environment.
///
/// # Errors
/// [`Refusal::NotFound`], [`Refusal::InFolder`] and [`Refusal::System`].
pub(super) fn command(
    invocation: &Invocation,
    trust_folder: bool,
    output: OwnedFd,
) -> Result<Command, Refusal> {
    let Invocation { words, folder, container, build } = invocation;
    let (name, arguments) = words.split_first().ok_or(Refusal::NotFound)?;
    let path = std::env::var_os("PATH").unwrap_or_else(|| PATH.into());
    let program = program(name, folder, trust_folder, &path)?;
    let both = output.try_clone().map_err(|error| Refusal::system("no descriptor", &error))?;
    let mut command = Command::new(program);
    command
        .arg0(name)
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .env("PATH", path)
        .env("LANDFALL_CONTAINER_NAME", container.as_str())
        .envs(std::env::var_os("HOME").map(|home| ("HOME", home)))
        .envs(build.map(|build| ("LANDFALL_BUILD", if build { "1" } else { "0" })))
        .stdin(Stdio::null())
        .stdout(both)
        .stderr(output)
        .process_group(0);
    Ok(command)
}

/// Returns the path of the program, found as a shell would find it, and outside of the folder.
fn program(name: &str, folder: &Path, trust_folder: bool, path: &OsString) -> Result<PathBuf, Refusal> {
    let candidates: Vec<PathBuf> = if name.contains('/') {
        vec![folder.join(name)]
    } else {
        // A relative directory in PATH would be relative to the folder.
        std::env::split_paths(path)
            .filter(|directory| directory.is_absolute())
            .map(|directory| directory.join(name))
            .collect()
    };
    let found = candidates
        .into_iter()
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file())
        .ok_or(Refusal::NotFound)?;
    if !trust_folder {
        // With all links resolved, since a link outside may lead into the folder. The folder's own path has no links.
        let real = std::fs::canonicalize(&found)
            .map_err(|error: io::Error| Refusal::system(&found.display().to_string(), &error))?;
        if real.starts_with(folder) || found.starts_with(folder) {
            return Err(Refusal::InFolder);
        }
    }
    Ok(found)
}
