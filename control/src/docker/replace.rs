//! Replaces a container by a new one, so that a failure leaves the old one unchanged.
//!
//! The old container is renamed aside while it still runs, and the new one is created under its name, so an invalid
//! configuration is detected before the old one is stopped. Then the old one is stopped, which frees its ports and
//! addresses, the new one is started, and the old one is removed once the new one stays up. A failed step undoes the earlier
//! steps.
//!
//! A daemon that dies in between leaves the old container under its other name ([`aside_name`]). The next attempt calls
//! [`recover`] first, which completes or undoes the replacement.

use super::{ASIDE_SUFFIX, DockerError};

/// The operations on containers that a replacement needs, by name.
pub(super) trait ContainerActions {
    /// Returns whether the container runs; `None` if it does not exist.
    async fn runs(&self, name: &str) -> Result<Option<bool>, DockerError>;
    async fn rename(&self, from: &str, to: &str) -> Result<(), DockerError>;
    /// Stops the container. Has no effect on a stopped one.
    async fn stop(&self, name: &str) -> Result<(), DockerError>;
    /// Starts the container, and checks that it stays up.
    async fn start(&self, name: &str) -> Result<(), DockerError>;
    /// Removes the container, running or not, and keeps its volumes.
    async fn remove(&self, name: &str) -> Result<(), DockerError>;
}

/// Returns the name of the old container during a replacement. A registered container has this suffix only if a client chose
/// such a name.
pub(super) fn aside_name(name: &str) -> String {
    format!("{name}{ASIDE_SUFFIX}")
}

/// Replaces the container of this name by a new one, which `create` makes under the name that it receives.
pub(super) async fn replace(
    actions: &impl ContainerActions,
    name: &str,
    create: impl AsyncFnOnce(&str) -> Result<(), DockerError>,
) -> Result<(), DockerError> {
    let aside_name = aside_name(name);
    let ran = actions.runs(name).await? == Some(true);
    actions.rename(name, &aside_name).await?;
    if let Err(error) = create(name).await {
        // The new container may exist although its creation failed, for example if it cannot join its second network.
        return Err(error_after_undo(error, restore(actions, name, ran).await, &aside_name));
    }
    let up = match actions.stop(&aside_name).await {
        Ok(()) => actions.start(name).await,
        Err(error) => Err(error),
    };
    if let Err(error) = up {
        return Err(error_after_undo(error, restore(actions, name, ran).await, &aside_name));
    }
    // The new container is up. If the old one cannot be removed now, the next replacement removes it.
    let _ = actions.remove(&aside_name).await;
    Ok(())
}

/// Completes or undoes an earlier replacement.
pub(super) async fn recover(actions: &impl ContainerActions, name: &str) -> Result<(), DockerError> {
    let aside_name = aside_name(name);
    if actions.runs(&aside_name).await?.is_none() {
        return Ok(());
    }
    match actions.runs(name).await? {
        // The new container is up, so only the removal of the old one remains.
        Some(true) => actions.remove(&aside_name).await,
        _ => restore(actions, name, true).await,
    }
}

/// Restores the name of the old container, and starts it if it ran.
async fn restore(actions: &impl ContainerActions, name: &str, ran: bool) -> Result<(), DockerError> {
    let aside_name = aside_name(name);
    if actions.runs(name).await?.is_some() {
        actions.remove(name).await?;
    }
    actions.rename(&aside_name, name).await?;
    match ran && actions.runs(name).await? != Some(true) {
        true => actions.start(name).await,
        false => Ok(()),
    }
}

/// Returns the error, with the error of undoing if that failed.
fn error_after_undo(error: DockerError, undone: Result<(), DockerError>, aside_name: &str) -> DockerError {
    match undone {
        Ok(()) => error,
        Err(more) => DockerError::Refused(format!(
            "{error}; and the old container could not be put back (see {aside_name}): {more}"
        )),
    }
}

#[cfg(test)]
#[path = "replace_tests.rs"]
mod tests;
