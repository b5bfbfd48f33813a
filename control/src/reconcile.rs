//! From what is seen to what the engine is asked to do.

pub mod plan;
