//! The names of choices, which command lines, headers and messages have in common.

/// Gives the values of an enum their names, the default first, and other names by which some are known.
macro_rules! named {
    ($choice:ident: $($value:ident = $name:literal $(| $other:literal)*),+) => {
        impl $choice {
            /// All of them, the default first.
            pub const ALL: &[Self] = &[$(Self::$value),+];

            /// What it is called by tools.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $name),+
                }
            }

            /// What tools call `name`.
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $($name $(| $other)* => Some(Self::$value),)+
                    _ => None,
                }
            }
        }
    };
}

pub(crate) use named;
