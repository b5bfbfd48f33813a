//! What the daemon keeps beside the registrations.
//!
//! - `grants` holds the rights that the host's user granted to containers, which outlive their registrations.
//! - `trust_file` holds the approvals of files in folders.

pub mod grants;
pub mod trust_file;
