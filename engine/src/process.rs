//! The engine as a process of its own.

use rustix::thread::{CapabilitySet, CapabilitySets};

/// Drops every capability of the calling thread but `keep`, and forbids it to gain any (`PR_SET_NO_NEW_PRIVS`).
///
/// A thread inherits both from the one that starts it, so call this while the process has a single thread.
///
/// # Errors
/// Those of `capset(2)`; they do not happen, since less may always be had.
pub fn shed_capabilities(keep: CapabilitySet) -> std::io::Result<()> {
    let had = rustix::thread::capabilities(None)?;
    let kept = had.permitted & keep;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}
