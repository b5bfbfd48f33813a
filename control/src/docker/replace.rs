//! Putting a new container in the place of an old one, so that a failure leaves the old one as it was.
//!
//! The old container is renamed aside while it still runs, and the new one is created under the name: whatever is wrong with
//! the configuration is found while nothing has been stopped. Then the old one is stopped, which frees its ports and
//! addresses, the new one started, and the old one removed when the new one stays up. Each step that fails is answered by
//! undoing those before it.
//!
//! A daemon that dies half way leaves the old one under its other name ([`aside`]). [`mend`], before the next attempt,
//! finishes or undoes what was begun.

use super::{ASIDE, DockerError};

/// What is done to containers here, by name.
pub(super) trait ContainerActions {
    /// Whether it exists, and runs if it does.
    async fn runs(&self, name: &str) -> Result<Option<bool>, DockerError>;
    async fn rename(&self, from: &str, to: &str) -> Result<(), DockerError>;
    /// Stops it; one that is stopped stays so.
    async fn stop(&self, name: &str) -> Result<(), DockerError>;
    /// Starts it, and sees that it stays up.
    async fn start(&self, name: &str) -> Result<(), DockerError>;
    /// Removes it, running or not, and keeps its volumes.
    async fn remove(&self, name: &str) -> Result<(), DockerError>;
}

/// The name of an old container while there are two. A container that was registered has a name without this ending only
/// by the will of whoever named it.
pub(super) fn aside(name: &str) -> String {
    format!("{name}{ASIDE}")
}

/// Puts a new container, which `create` makes under the name that it is given, in the place of the one with this name.
pub(super) async fn replace(
    actions: &impl ContainerActions,
    name: &str,
    create: impl AsyncFnOnce(&str) -> Result<(), DockerError>,
) -> Result<(), DockerError> {
    let aside = aside(name);
    let ran = actions.runs(name).await? == Some(true);
    actions.rename(name, &aside).await?;
    if let Err(error) = create(name).await {
        // It may have failed with the new container there: one that cannot join its second network.
        return Err(undo(error, put_back(actions, name, ran).await, &aside));
    }
    let up = match actions.stop(&aside).await {
        Ok(()) => actions.start(name).await,
        Err(error) => Err(error),
    };
    if let Err(error) = up {
        return Err(undo(error, put_back(actions, name, ran).await, &aside));
    }
    // The new one is up. An old one that cannot be removed now is removed before the next time.
    let _ = actions.remove(&aside).await;
    Ok(())
}

/// Finishes or undoes what an earlier attempt left.
pub(super) async fn mend(actions: &impl ContainerActions, name: &str) -> Result<(), DockerError> {
    let aside = aside(name);
    if actions.runs(&aside).await?.is_none() {
        return Ok(());
    }
    match actions.runs(name).await? {
        // The new one is up; what is left is the old one's removal.
        Some(true) => actions.remove(&aside).await,
        _ => put_back(actions, name, true).await,
    }
}

/// The old one gets its name back, and runs again if it did.
async fn put_back(actions: &impl ContainerActions, name: &str, ran: bool) -> Result<(), DockerError> {
    let aside = aside(name);
    if actions.runs(name).await?.is_some() {
        actions.remove(name).await?;
    }
    actions.rename(&aside, name).await?;
    match ran && actions.runs(name).await? != Some(true) {
        true => actions.start(name).await,
        false => Ok(()),
    }
}

/// The failure, and what became of undoing it.
fn undo(error: DockerError, undone: Result<(), DockerError>, aside: &str) -> DockerError {
    match undone {
        Ok(()) => error,
        Err(more) => DockerError::Refused(format!(
            "{error}; and the old container could not be put back (see {aside}): {more}"
        )),
    }
}

#[cfg(test)]
#[path = "replace_tests.rs"]
mod tests;
