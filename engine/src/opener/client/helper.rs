//! Openers that a helper starts: a process with privileges that the caller lacks.
//!
//! A helper listens on a Unix socket (`SOCK_SEQPACKET`), permits only the calling user to connect, and passes each
//! connection to a new opener as its first channel. The protocol is the same as with an opener that the caller starts; only
//! the privileges differ. A pidfd refers to its process in any process namespace (`pidfd_open(2)`), so a helper that cannot
//! see the process can still enter its network.
//!
//! A helper runs the same program as the caller, so its openers are trusted. Cheap checks are made all the same: the socket
//! must not be a link, and the first socket must be of the namespace that the opener named.

use std::path::Path;

use super::agent::{OWN_NAMESPACE, connect_socket, own_cookie};
use super::{OpenError, Opener, Target, enter, refused};
use crate::channel::Channel;
use crate::opener::FailureKind;

/// Checks that a helper listens at `socket`. Never waits.
///
/// # Errors
/// [`OpenError::Helper`] with the reason.
pub fn helper_listens(socket: &Path) -> Result<(), OpenError> {
    connect_to_helper(socket).map(drop)
}

impl Opener {
    /// Requests an opener from the helper that listens at `socket`, sends it `target`, and waits until it is inside, for
    /// some seconds at most.
    ///
    /// # Errors
    /// [`OpenError::Helper`] if the helper is unavailable or its opener gave an invalid answer; otherwise those of
    /// [`Opener::spawn`].
    pub fn spawn_by_helper(socket: &Path, target: Target) -> Result<Opener, OpenError> {
        let unusable = |source| unusable(socket, source);
        let channel = connect_to_helper(socket)?;
        let (netns_inode, netns_cookie) = enter(&channel, &target).map_err(|error| match error {
            OpenError::Refused(_) => error,
            error => unusable(error),
        })?;
        if own_cookie()? == netns_cookie {
            return Err(refused(FailureKind::OwnNamespace, OWN_NAMESPACE.to_owned()));
        }
        let mut opener = Opener { channel, netns_inode, netns_cookie };
        opener.verify_namespace().map_err(unusable)?;
        Ok(opener)
    }
}

fn unusable(socket: &Path, source: OpenError) -> OpenError {
    OpenError::Helper { socket: socket.to_owned(), source: Box::new(source) }
}

fn connect_to_helper(socket: &Path) -> Result<Channel, OpenError> {
    let name = socket.file_name().and_then(|name| name.to_str());
    let connected = match socket.parent().zip(name) {
        Some((directory, name)) => connect_socket(directory, name, "helper"),
        None => Err(refused(FailureKind::Other, "this is not the path of a socket".to_owned())),
    };
    connected.map_err(|source| unusable(socket, source))
}
