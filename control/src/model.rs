//! Values that several parts of landfall share. Each file here is pure.

pub mod grants;
pub mod size;
pub mod trust;
