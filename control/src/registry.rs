//! What the daemon keeps beside the registrations.

pub mod trust_file;
